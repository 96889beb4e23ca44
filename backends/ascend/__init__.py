"""Huawei Ascend through torch_npu. Emulated: never run on hardware."""
