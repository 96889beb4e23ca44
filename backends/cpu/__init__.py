"""The CPU: kernels in Numba on the checkpoint's own bytes, the same bits for any batch, chunk and thread count."""
