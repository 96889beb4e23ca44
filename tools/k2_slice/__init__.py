"""Checkpoints at Kimi-K2's true tensor sizes with few layers and random weights; tools/make_slice.py is the command."""
