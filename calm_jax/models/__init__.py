"""Patches -> latents -> hidden -> samples: Flax modules, and pure functions of their parameters."""
