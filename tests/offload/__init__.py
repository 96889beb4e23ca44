"""Where the experts are and who leaves: policies, traces, replay, statistics."""
