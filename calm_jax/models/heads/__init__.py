"""Hidden -> samples: one file per generative head."""
