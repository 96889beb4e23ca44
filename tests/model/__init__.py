"""Config and maths, against transformers."""
