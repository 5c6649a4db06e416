"""Pictures: the influence of a pixel, training curves, times of kernels, a training batch."""
