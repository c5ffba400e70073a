"""Rules as a torch optimizer: the optimizer, its guard, sharded parameters, fused kernels."""
