"""Small models in the published formats, made of random numbers: for tests, for the test pack, and for benchmarks."""
