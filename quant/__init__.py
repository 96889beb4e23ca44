"""The model on disk: number formats, checkpoints in and out. Never multiplies, never caches."""

if __name__ != "k2lite.quant":
    raise ImportError("import k2lite.quant, not quant")
