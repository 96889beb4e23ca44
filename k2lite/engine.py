"""Prefill and decode: token ids in, token ids out, with counters.

Invariant: a token's logits depend on the tokens before it in its own sequence and on nothing else: not on the chunk,
not on the batch. Deals in ids; holds the folder's tokenizer for its callers and never looks at text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence as Ids
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal

import torch

from k2lite.backends.base import Backend
from k2lite.offload.source import ExpertSource
from k2lite.quant.errors import ContextLengthError, RequestError

from .batch import BatchRow
from .config import ModelConfig
from .kv_cache import LatentCache
from .memory_guard import MemoryGuard
from .model import Model
from .placement import Placement
from .sampling import SamplingParams, Token, sample

if TYPE_CHECKING:
    from .text.tokenizer import Tokenizer


@dataclass
class Counters:
    """What the engine did since it was opened."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0


class Sequence:
    """One growing row of tokens and its cache. Made by `Engine.open`; `close` frees the cache."""

    def __init__(self, config: ModelConfig, max_tokens: int, backend: Backend) -> None:
        self.ids: list[int] = []
        self.max_tokens = max_tokens
        self._config, self._backend = config, backend
        self._cache: LatentCache | None = LatentCache(config, max_tokens, backend)

    @property
    def cache(self) -> LatentCache:
        if self._cache is None:
            raise RuntimeError("the sequence is closed")
        return self._cache

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens: what is common with a next prompt need not be computed again."""
        self.cache.truncate(length)
        del self.ids[length:]

    def fork(self, length: int) -> Sequence:
        """A sequence of its own that begins with the first `length` tokens of this one; their cache is copied."""
        with self._backend.telling():
            other = Sequence(self._config, self.max_tokens, self._backend)
            other.cache.copy_from(self.cache, length)
        other.ids = self.ids[:length]
        return other

    def append(self, ids: Ids[int], rows: torch.Tensor) -> None:
        """Take tokens whose latents are known: `rows` float32 [layers, n, latent], from `cache.read` of a sequence that
        holds the same tokens up to there."""
        self.cache.append(rows)
        self.ids.extend(ids)

    def close(self) -> None:
        self._cache = None

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Chunk:
    """The next tokens of a sequence, and which of their logits are wanted."""

    sequence: Sequence
    ids: Ids[int]
    logits: Literal["last", "all", "none"] = "last"


class Engine:
    """A loaded model. `stop_ids` are the ids that end an answer, `recommended_sampling` is its makers' advice."""

    def __init__(
        self,
        model: Model,
        experts: ExpertSource,
        placement: Placement,
        *,
        guard: MemoryGuard,
        owned_backends: Ids[Backend],
        stop_ids: frozenset[int],
        recommended_sampling: SamplingParams,
        tokenizer: Tokenizer,
    ) -> None:
        self.config = model.config
        self.placement = placement
        self.experts = experts
        self.counters = Counters()
        self.stop_ids = stop_ids
        self.recommended_sampling = recommended_sampling
        self.tokenizer = tokenizer
        self._guard = guard
        self._model = model
        self._owned_backends = owned_backends

    @property
    def backend(self) -> Backend:
        """What multiplies."""
        return self._model.backend

    def open(self, max_tokens: int | None = None) -> Sequence:
        """A new, empty sequence with room for `max_tokens` (the planned context by default)."""
        limit = self.placement.context_tokens
        tokens = limit if max_tokens is None else max_tokens
        if not 1 <= tokens <= limit:
            raise ContextLengthError(f"{tokens} tokens asked for; the planned context holds {limit}")
        with self.backend.telling():
            return Sequence(self.config, tokens, self.backend)

    def new_conversation(self) -> None:
        """What follows has another topic: what routing showed so far counts for less."""
        self.experts.recall(self.experts.learned())

    def close(self) -> None:
        """End the threads that read and, where the backend was opened for this engine, those that compute, and close
        the weight files; the engine is of no use afterwards. An engine that is dropped closes by itself."""
        self._model.close()
        for backend in self._owned_backends:
            backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.inference_mode()
    def step(self, chunks: Ids[Chunk]) -> list[torch.Tensor]:
        """Take each chunk's tokens into its sequence. Returns float32 logits per chunk: [1, vocab] for "last",
        [n, vocab] for "all", [0, vocab] for "none". All sequences must be different.

        If anything fails, no sequence has changed."""
        self._check(chunks)
        with self.backend.telling():
            logits, rows = self._computed(chunks)
        for chunk, row in zip(chunks, rows, strict=True):
            row.cache.advance(row.tokens)
            chunk.sequence.ids.extend(chunk.ids)
        self._guard.check()
        return logits

    def _computed(self, chunks: Ids[Chunk]) -> tuple[list[torch.Tensor], list[BatchRow]]:
        ids = torch.tensor([token for chunk in chunks for token in chunk.ids], dtype=torch.int64)
        rows: list[BatchRow] = []
        for chunk in chunks:
            start = rows[-1].stop if rows else 0
            rows.append(BatchRow(start, start + len(chunk.ids), chunk.sequence.cache))
        hidden = self._model.hidden_states(ids, rows)
        first = {"last": lambda row: row.stop - 1, "all": lambda row: row.start, "none": lambda row: row.stop}
        logits = [
            self._model.logits(hidden[first[chunk.logits](row) : row.stop])
            for chunk, row in zip(chunks, rows, strict=True)
        ]
        return logits, rows

    def prefill(self, sequence: Sequence, ids: Ids[int], *, chunk_tokens: int | None = None) -> torch.Tensor:
        """Take a prompt into a sequence in chunks (default: the planned size); float32 logits [vocab] of its last
        token."""
        self._check_chunk(Chunk(sequence, ids))
        chunk_tokens = self.placement.prefill_chunk_tokens if chunk_tokens is None else chunk_tokens
        if chunk_tokens < 1:
            raise RequestError(f"chunk_tokens is {chunk_tokens}; expected 1 or more")
        began = time.perf_counter()
        for at in range(0, len(ids), chunk_tokens):
            part = ids[at : at + chunk_tokens]
            last = at + chunk_tokens >= len(ids)
            (logits,) = self.step([Chunk(sequence, part, "last" if last else "none")])
        self.counters.prefill_tokens += len(ids)
        self.counters.prefill_s += time.perf_counter() - began
        return logits[0]

    def logits(self, ids: Ids[int]) -> torch.Tensor:
        """float32 [T, vocab] for a list of T token ids, from an empty context."""
        if not len(ids):
            raise RequestError("the list of token ids is empty")
        with self.open(len(ids)) as sequence:
            return self.step([Chunk(sequence, ids, "all")])[0]

    def generate(
        self,
        ids: Ids[int],
        *,
        max_tokens: int | None = None,
        temperature: float = SamplingParams.temperature,
        top_k: int = SamplingParams.top_k,
        top_p: float = SamplingParams.top_p,
        min_p: float = SamplingParams.min_p,
        seed: int = SamplingParams.seed,
        stop_ids: frozenset[int] | None = None,
    ) -> Iterator[Token]:
        """Yield new tokens after the prompt `ids`; the last one may be a stop id (`token.is_stop`).

        Errors about the request are raised by this call, before any work. Closing the iterator frees its cache."""
        params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
        wanted = self.check_request(len(ids), max_tokens)
        self.check_ids(ids)
        sequence = self.open(len(ids) + wanted)
        return self._generate(sequence, list(ids), wanted, params, self.stop_ids if stop_ids is None else stop_ids)

    def check_request(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """New tokens a request may make: `max_tokens`, or all that the context has room for. Raises RequestError or
        ContextLengthError where the request can't be met whole."""
        if not prompt_tokens:
            raise RequestError("the prompt is empty: there must be at least one token to go on from")
        context = self.placement.context_tokens
        room = context - prompt_tokens
        wanted = max(room, 1) if max_tokens is None else max_tokens
        if wanted < 1:
            raise RequestError(f"max_tokens is {wanted}; expected 1 or more")
        if wanted > room:
            raise ContextLengthError(
                f"the prompt has {prompt_tokens} tokens and {wanted} new ones are asked for; the context holds "
                f"{context}: shorten the prompt, ask for fewer tokens, or raise the context"
            )
        return wanted

    def check_ids(self, ids: Ids[int]) -> None:
        """Raise RequestError for the first id that is no token of this model."""
        vocab = self.config.vocab_size
        for token in ids:
            if not isinstance(token, Integral):
                raise RequestError(f"token id {token!r} is not an integer")
            if not 0 <= token < vocab:
                raise RequestError(f"token id {token} is outside the vocabulary of {vocab}")

    def _generate(
        self, sequence: Sequence, ids: Ids[int], max_tokens: int, params: SamplingParams, stop_ids: frozenset[int]
    ) -> Iterator[Token]:
        with sequence:
            yield from self.continue_sequence(sequence, ids, max_tokens, params, stop_ids)

    def continue_sequence(
        self, sequence: Sequence, ids: Ids[int], max_tokens: int, params: SamplingParams, stop_ids: frozenset[int]
    ) -> Iterator[Token]:
        """Take `ids` into an open sequence and yield up to `max_tokens` new tokens. The last token yielded is not
        yet part of the sequence's cache."""
        logits = self.prefill(sequence, ids)
        for left in range(max_tokens - 1, -1, -1):
            token = sample(logits, params, len(sequence.ids))
            token.is_stop = int(token) in stop_ids
            yield token
            if token.is_stop or not left:
                return
            began = time.perf_counter()
            logits = self.step([Chunk(sequence, [int(token)])])[0][0]
            self.counters.decode_tokens += 1
            self.counters.decode_s += time.perf_counter() - began

    def _check(self, chunks: Ids[Chunk]) -> None:
        if len({id(chunk.sequence) for chunk in chunks}) != len(chunks):
            raise ValueError("a sequence has two chunks in one step")
        for chunk in chunks:
            self._check_chunk(chunk)

    def _check_chunk(self, chunk: Chunk) -> None:
        held, new, room = len(chunk.sequence.ids), len(chunk.ids), chunk.sequence.max_tokens
        if not new:
            raise RequestError("a chunk without tokens")
        if held + new > room:
            raise ContextLengthError(
                f"{held} tokens are in the sequence and {new} more are asked for; it has room for {room}"
            )
        self.check_ids(chunk.ids)
