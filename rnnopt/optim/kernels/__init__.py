"""Fused steps that match the plain rule: on the CPU in C, on a GPU in Triton."""
