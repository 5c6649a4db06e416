"""Thin mains: train, evaluate, predict, and one file per figure or table."""
