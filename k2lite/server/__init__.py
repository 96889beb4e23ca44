"""The HTTP server: OpenAI's and Anthropic's APIs over one scheduler. Imported by `k2lite serve` only."""
