"""What bench_tiers.py is made of."""
