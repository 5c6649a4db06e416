"""Facts that a compiler tells without a card: registers and spills of kernels, memory of train steps."""
