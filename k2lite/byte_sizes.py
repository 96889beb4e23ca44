"""Sizes of memory as a user writes them: 96GiB, 20GB, 512MiB, 1073741824. Decimal units are powers of 1000. And as a
person reads them."""

from __future__ import annotations

import re

from k2lite.quant.errors import RequestError

_UNITS = {"": 1, "b": 1, **{f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)},
          **{f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)}}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Bytes of a size. Raises RequestError."""
    if isinstance(text, int):
        if text < 0:
            raise RequestError(f"a size of {text} bytes; expected 0 or more")
        return text
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise RequestError(f"{text!r} is no size; write it as 96GiB, 20GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def gib(nbytes: int) -> str:
    """Bytes as a person reads them: GiB, below one MiB, below that KiB."""
    if nbytes >= 2**30:
        return f"{nbytes / 2**30:.2f} GiB"
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 2**20 else f"{nbytes / 2**10:.1f} KiB"
