"""Diffusion models that fill in holes, on pixels or on latents, with networks and schedulers of diffusers."""
