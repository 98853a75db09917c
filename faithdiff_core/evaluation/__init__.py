"""Metrics of restored images."""
