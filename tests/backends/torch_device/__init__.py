"""What every torch accelerator shares, on the stand-in device."""
