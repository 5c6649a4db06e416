"""Evaluation: accuracy of classifiers, scores of generated images, and archives of images."""
