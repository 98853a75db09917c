"""Tiles: grids, merge weights, and blending."""
