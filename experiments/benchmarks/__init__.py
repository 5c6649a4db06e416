"""Times on the machine at hand, behind a check of correctness: kernels, mixers, models and the input pipeline."""
