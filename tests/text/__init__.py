"""Tokenizers, templates and streaming, against golden files."""
