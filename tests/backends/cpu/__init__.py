"""The CPU backend: exact and equal bits on every path, accuracy, special values, threads, compilation."""
