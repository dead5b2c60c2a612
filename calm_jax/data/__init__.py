"""Text -> tokens -> blocks: sources, tokenizers, the token store, the input pipeline."""
