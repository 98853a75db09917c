"""Captions: the captioner and trimming."""
