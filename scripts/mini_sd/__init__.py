"""The embedded miniature Stable Diffusion: its pictures, its training stages and its judge."""
