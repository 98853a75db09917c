"""Decoding large latents in tiles that share their normalization statistics."""
