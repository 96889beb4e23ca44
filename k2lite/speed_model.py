"""What speed bytes and bandwidths allow: hit rates, the time a token takes, what limits it.

Three hit curves stand for what is not known before a model has run: the router's habits. They are from others' traces
and measurements, which stand beside them. Knows no files and no devices; times in seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Literal

Curve = Literal["low", "middle", "high"]
# Beside an accelerator: the host multiplies all experts, all are sent, or the host does those it has no room for.
Place = Literal["host", "device", "split"]
PLACES: tuple[Place, ...] = ("host", "device", "split")
CURVES: tuple[Curve, ...] = ("low", "middle", "high")

# Share of experts in memory, and the share of uses that find theirs there: low as a GLM-5.2 engine measured, middle
# as Kimi-Linear's trace under LRU, high as DeepSeek-V4.1's trace.
_SHARES = (0.0, 0.02, 0.035, 0.05, 0.074, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50, 0.70, 0.85, 1.0)
_HITS: dict[Curve, tuple[float, ...]] = {
    "low": (0, 0.10, 0.17, 0.24, 0.40, 0.46, 0.55, 0.62, 0.68, 0.73, 0.80, 0.86, 0.93, 0.97, 1),
    "middle": (0, 0.21, 0.34, 0.42, 0.50, 0.545, 0.622, 0.684, 0.735, 0.778, 0.844, 0.89, 0.946, 0.98, 1),
    "high": (0, 0.27, 0.40, 0.50, 0.59, 0.66, 0.74, 0.81, 0.85, 0.88, 0.92, 0.945, 0.975, 0.99, 1),
}
# The next layer's router on this layer's state: share of choices it names, and share of its names that are right.
_RECALL, _PRECISION = 0.65, 0.80
# Kimi-K2: share of a layer's experts that a chunk of so many tokens touches.
_CHUNKS = (1.0, 16.0, 64.0, 256.0, 512.0, 2048.0, 8192.0, 32768.0)
_TOUCHED = (8 / 384, 0.23, 0.40, 0.69, 0.80, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Bandwidths:
    """Bytes a second of memory, of the drive, of the accelerator's memory and of the way there (0 without one), and
    operations a second in long prompts, of the accelerator if there is one (`host_flops`: the processor's beside it,
    0 if not known). `layer_s` is what a layer costs beside its bytes. With `one_bus` all that is
    computed comes from the same memory: no accelerator, or one that shares it."""

    memory: float
    drive: float
    flops: float
    layer_s: float
    one_bus: bool
    device: float = 0.0
    bus: float = 0.0
    host_flops: float = 0.0


@dataclass(frozen=True)
class Work:
    """What one token moves, in bytes, and how many experts of how many it needs. `active` of all layers together;
    `trunk_flops` are those of the operations that no expert does."""

    trunk_read: float
    expert: float
    experts: int
    active: int
    layers: int
    flops_per_token: float
    trunk_flops: float = 0.0


@dataclass(frozen=True)
class Decode:
    """Speed of writing one token after another. `serial`, `best`, `perfect` in tokens/s: nothing overlaps; reads
    overlap arithmetic inside a layer, or are issued a layer ahead where that pays; everything overlaps."""

    hit_rate: float
    missing_bytes: float
    device_s: float
    memory_s: float
    drive_s: float
    serial: float
    best: float
    perfect: float
    link_s: float = 0.0

    @property
    def limit(self) -> str:
        """What takes longest."""
        times = {
            "the drive": self.drive_s,
            "memory": self.memory_s,
            "the accelerator": self.device_s,
            "the link to the accelerator": self.link_s,
        }
        return max(times, key=lambda name: times[name])


def hit_rate(curve: Curve, share: float) -> float:
    """Uses that find their expert, for a share of all experts in memory; linear between the known points."""
    return _between(min(max(share, 0.0), 1.0), _SHARES, _HITS[curve])


def touched_share(tokens: int) -> float:
    """Experts of a layer that a chunk of a prompt touches."""
    return _between(float(min(max(tokens, 1), _CHUNKS[-1])), _CHUNKS, _TOUCHED)


def decode_speed(
    work: Work,
    rates: Bandwidths,
    curve: Curve | float,
    *,
    held: float,
    on_device: float = 0.0,
    place: Place = "split",
    recall: float = _RECALL,
) -> Decode:
    """`held` bytes of experts in memory, `on_device` in the accelerator's (none with `place` host). A number in place
    of a curve is the share of uses that find their expert in memory, where it is known. `recall`: of choices, what the
    next router names."""
    on_device = 0.0 if place == "host" else on_device
    bank = work.experts * work.expert
    if isinstance(curve, str):
        at_device = hit_rate(curve, on_device / bank) if on_device > 0 else 0.0
        found = hit_rate(curve, (on_device + held) / bank)
    else:
        at_device, found = curve * on_device / max(on_device + held, 1.0), curve
    needed = work.active * work.expert
    missing = needed * (1 - found)
    overhead = work.layers * rates.layer_s
    if rates.one_bus:
        # reading from the drive writes memory once more
        memory_s = (work.trunk_read + needed + missing) / rates.memory + overhead
        device_s = link_s = beside_s = 0.0
        first_s = memory_s
    elif place == "device":
        device_s = (work.trunk_read + needed) / rates.device + overhead
        link_s = needed * (1 - at_device) / rates.bus
        # the link's reads of memory, and the drive's writes
        memory_s = (needed * (1 - at_device) + missing) / rates.memory
        first_s, beside_s = device_s, max(link_s, memory_s)
    else:
        link_s = 0.0
        device_s = work.trunk_read / rates.device + at_device * needed / rates.device + overhead
        memory_s = beside_s = (needed * (1 - at_device) + missing) / rates.memory
        first_s = device_s
    drive_s = missing / rates.drive
    inside = first_s + max(beside_s, drive_s)
    more = 1 + recall * (1 / _PRECISION - 1)
    ahead = max(first_s + max(beside_s, (1 - recall) * drive_s), more * drive_s)
    return Decode(
        hit_rate=found,
        missing_bytes=missing,
        device_s=device_s,
        memory_s=memory_s,
        drive_s=drive_s,
        serial=1 / (first_s + beside_s + drive_s),
        best=1 / min(inside, ahead),
        perfect=1 / max(first_s, beside_s, drive_s),
        link_s=link_s,
    )


def prefill_speed(
    work: Work,
    rates: Bandwidths,
    tokens: int,
    *,
    held: float,
    on_device: float = 0.0,
    place: Place = "split",
    share: float | None = None,
) -> float:
    """Tokens/s of reading a prompt in chunks of `tokens`: each expert that is touched is read once a chunk. `share`: of
    a layer's experts that such a chunk touches, where it is known. On a processor alone the trunk's arithmetic is added
    to the reads: a layer's experts are known only after it, and few of the next layer's have room before. 0 where the
    host multiplies and its operations a second are not known."""
    bank = work.experts * work.expert
    touched = bank * (touched_share(tokens) if share is None else share)
    drive_s = (1 - min(1.0, (held + on_device) / bank)) * touched / rates.drive
    flops, trunk_s = rates.flops, 0.0
    flops_per_token = work.flops_per_token
    if rates.one_bus:
        carry_s = (touched + work.trunk_read) / rates.memory
        trunk_s = tokens * work.trunk_flops / flops
        flops_per_token -= work.trunk_flops
    elif place == "host":
        carry_s, flops = touched / rates.memory, rates.host_flops
        if not flops:
            return 0.0
    else:
        carry_s = (1 - on_device / bank) * touched / rates.bus
    return tokens / (max(drive_s, carry_s, tokens * flops_per_token / flops) + trunk_s)


def what_would_help(
    work: Work, rates: Bandwidths, *, held: float, on_device: float = 0.0, place: Place = "split"
) -> dict[str, float]:
    """Factors on decode speed (middle curve) of twice the memory, a drive twice as fast, memory twice as fast, and with
    experts on an accelerator a link twice as fast."""

    def speed(rates: Bandwidths, held: float) -> float:
        return decode_speed(work, rates, "middle", held=held, on_device=on_device, place=place).best

    now = speed(rates, held)
    factors = {
        "twice the memory for experts": speed(rates, min(2 * held, work.experts * work.expert - on_device)) / now,
        "a drive twice as fast": speed(replace(rates, drive=2 * rates.drive), held) / now,
        "memory twice as fast": speed(replace(rates, memory=2 * rates.memory), held) / now,
    }
    if place == "device":
        factors["a link twice as fast"] = speed(replace(rates, bus=2 * rates.bus), held) / now
    return factors


def _between(x: float, xs: tuple[float, ...], ys: tuple[float, ...]) -> float:
    after = bisect_right(xs, x)
    if after >= len(xs):
        return ys[-1]
    x0, x1, y0, y1 = xs[after - 1], xs[after], ys[after - 1], ys[after]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
