"""Diffusion models that fill in holes, in the space of pixels or of latents, on networks and schedulers of diffusers."""
