"""Pallas Mosaic GPU kernels for NVIDIA cards with TMA (compute capability 9.0 and above)."""
