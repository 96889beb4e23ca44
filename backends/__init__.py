"""What multiplies: one file a device behind one small interface. Never sees a cache or a file."""

if __name__ != "k2lite.backends":
    raise ImportError("import k2lite.backends, not backends")
