"""A device of our own for tests, where there is none: strict where a real one is silent."""
