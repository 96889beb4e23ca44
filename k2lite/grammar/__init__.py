"""Constrained decoding: JSON schemas as byte grammars, masks of allowed tokens, and the shortest valid end."""
