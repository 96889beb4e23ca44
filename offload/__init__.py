"""Where the experts' bytes are, and who may use them when. Never sees arithmetic."""

if __name__ != "k2lite.offload":
    raise ImportError("import k2lite.offload, not offload")
