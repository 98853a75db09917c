"""Decoding large latents in tiles that share their statistics."""
