"""Where the bytes are: leases, the store, faults, prefetch."""
