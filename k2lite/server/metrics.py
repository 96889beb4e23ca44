"""What the server and the machine are doing: Prometheus's text for monitors, one object for the page."""

from __future__ import annotations

from typing import Any

import numpy as np

from .service import Service


class Metrics:
    """Reads counters that others keep; keeps only what the page saw last, to say what has lit up since."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def text(self) -> str:
        """Prometheus's exposition format, version 0.0.4."""
        lines = []
        for name, kind, help_text, value in self._values():
            lines += [f"# HELP k2lite_{name} {help_text}", f"# TYPE k2lite_{name} {kind}", f"k2lite_{name} {value:g}"]
        return "\n".join(lines) + "\n"

    def _values(self) -> list[tuple[str, str, str, float]]:
        scheduler, engine = self._service.scheduler, self._service.engine
        totals, source = scheduler.totals, engine.experts.counters
        return [
            ("requests_total", "counter", "Requests taken", totals.requests),
            ("requests_finished_total", "counter", "Requests answered", totals.finished),
            ("requests_failed_total", "counter", "Requests the engine failed at", totals.failed),
            ("requests_cancelled_total", "counter", "Requests whose client left", totals.cancelled),
            ("requests_refused_total", "counter", "Requests refused because the queue was full", totals.refused),
            ("requests_running", "gauge", "Requests in a slot", scheduler.running),
            ("requests_waiting", "gauge", "Requests in the queue", scheduler.waiting),
            ("prompt_tokens_total", "counter", "Tokens of prompts", totals.prompt_tokens),
            ("cached_tokens_total", "counter", "Tokens of prompts taken from kept prefixes", totals.cached_tokens),
            ("completion_tokens_total", "counter", "Tokens written", totals.completion_tokens),
            ("steps_total", "counter", "Steps of the engine", totals.steps),
            ("step_seconds_total", "counter", "Time in steps", totals.step_s),
            ("kept_prefix_tokens", "gauge", "Tokens in kept prefixes", scheduler.prefixes.tokens),
            ("stored_prefix_bytes", "gauge", "Bytes of prefixes on the drive", scheduler.prefixes.stored_bytes),
            ("experts_requested_total", "counter", "Experts asked for", source.requested_experts),
            ("experts_read_total", "counter", "Experts read from disk", source.read_experts),
            ("expert_read_bytes_total", "counter", "Bytes of experts read", source.read_bytes),
            ("expert_read_seconds_total", "counter", "Time spent reading experts", source.read_s),
        ]

    def state(self) -> dict[str, Any]:
        """The live state: speeds, queue, memory against the plan, and how often each expert was used, per layer."""
        scheduler, engine = self._service.scheduler, self._service.engine
        totals, source, plan = scheduler.totals, engine.experts.counters, engine.placement
        stats = engine.experts.stats
        requested = source.requested_experts
        return {
            "model": self._service.name,
            "tokens_s": round(totals.decode_rate, 2) if scheduler.running else 0.0,
            "running": scheduler.running,
            "slots": scheduler.slots,
            "waiting": scheduler.waiting,
            "prompt_tokens": totals.prompt_tokens,
            "cached_tokens": totals.cached_tokens,
            "completion_tokens": totals.completion_tokens,
            "hit_rate": {"HOST": source.hit_experts / requested if requested else None},
            "disk_gb_s": source.read_bytes / source.read_s / 1e9 if source.read_s else None,
            "memory": {
                "rss_bytes": _resident_bytes(),
                "plan_bytes": plan.total_bytes,
            },
            "plan": str(plan),
            "layers": list(stats.layers),
            "counts": np.asarray(stats.counts).tolist(),
        }


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
