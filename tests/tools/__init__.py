"""Tests of tools/demo_training: the optimizer, the model against plain loops, data, export, evaluation."""
