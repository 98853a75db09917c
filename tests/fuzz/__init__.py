"""Seeded fuzzers: real files are mutated, and whatever is not a named error is a failure."""
