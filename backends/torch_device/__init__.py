"""What every torch accelerator shares: memory, streams, events, pinned staging, experts on their way to slots."""
