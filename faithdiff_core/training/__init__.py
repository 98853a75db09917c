"""Training (Algorithm 1 of the paper): configuration, data, degradation, and the loop on Hugging Face accelerate."""
