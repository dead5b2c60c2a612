"""Hidden -> samples: one file per generative head, which holds all that is its own."""
