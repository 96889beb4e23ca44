"""The backend on NVIDIA cards: Triton kernels on the checkpoint's own bytes. See README.md; imports nothing."""
