"""Hidden -> samples -> text: temperature without likelihoods, decoding, prompts."""
