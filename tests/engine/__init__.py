"""Generation, invariance, sampling and leases."""
