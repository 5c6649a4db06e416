"""GSPN in JAX and Flax: token mixers, models, data, training and evaluation.

Notation: B batch, H rows, W columns, C channels; images and maps are channels-last.
"""
