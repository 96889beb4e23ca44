"""Formats, files and checkpoints, against independent readers."""
