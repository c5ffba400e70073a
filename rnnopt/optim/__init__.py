"""Rules as a torch optimizer: the optimizer, its safeguard, sharded parameters, fast kernels."""
