"""Text to token ids and back: tokenizers, chat templates, streaming. Knows no model and no engine."""
