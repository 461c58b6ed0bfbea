"""Operators with forward and backward passes by hand, and their Triton kernels for CUDA."""
