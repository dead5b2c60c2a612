"""Patches -> latents -> hidden -> samples: pure linen modules, no losses, no meshes."""
