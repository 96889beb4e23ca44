"""The CUDA backend's kernels without a card: in Triton's interpreter, and compiled for cards that are not here."""
