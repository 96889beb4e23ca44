"""Has an engine read a text and keeps what its routers chose.

Invariant: the trace is the same whatever the chunks were, since a token's choice depends on the tokens before it only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from k2lite.offload.recording import RoutingRecorder
from k2lite.offload.routing_trace import RoutingTrace, TracedModel
from k2lite.quant.errors import RequestError

from .engine import Chunk, Engine


def record_routing(
    engine: Engine,
    ids: Sequence[int],
    model: TracedModel,
    progress: Callable[[int], None] | None = None,
    *,
    head: bool = False,
) -> RoutingTrace:
    """Read the ids [T] in chunks, with `head` to the logits; `progress` gets the tokens done. What the context
    can't hold at once is read in windows of it, each from an empty context. Raises RequestError for no ids."""
    if not ids:
        raise RequestError("the text has no tokens")
    engine.check_ids(ids)
    recorder = RoutingRecorder(model.layers)
    window, chunk = engine.placement.context_tokens, engine.placement.prefill_chunk_tokens
    wanted: Literal["all", "none"] = "all" if head else "none"
    before = engine.experts.observers
    engine.experts.observers = (*before, recorder.observe)
    try:
        for start in range(0, len(ids), window):
            part = ids[start : start + window]
            with engine.open(len(part)) as sequence:
                for at in range(0, len(part), chunk):
                    engine.step([Chunk(sequence, part[at : at + chunk], wanted)])
                    if progress is not None:
                        progress(start + len(sequence.ids))
    finally:
        engine.experts.observers = before
    chosen, weights = recorder.arrays()
    return RoutingTrace(chosen, model, weights)
