"""Meta-learning: the unroll, meta-training, initial values, several processes."""
