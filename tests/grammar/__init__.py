"""Constrained decoding: grammars against jsonschema and llguidance, answers against their schemas."""
