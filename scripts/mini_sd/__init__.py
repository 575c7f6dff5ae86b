"""The bundled miniature Stable Diffusion: its images, its training stages and its judge."""
