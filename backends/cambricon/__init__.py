"""Cambricon through torch_mlu and torch_mlu_ops. Emulated: never run on hardware."""
