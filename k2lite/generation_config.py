"""generation_config.json: the ids that end an answer and the sampling its makers recommend. All of it optional.

The same keys inside config.json are artefacts of the library that wrote it and are not read.
"""

from __future__ import annotations

from pathlib import Path

from k2lite.quant.errors import ConfigError, RequestError

from .config_reader import KeyReader, read_object
from .sampling import SamplingParams


def read_generation_config(folder: Path) -> tuple[tuple[int, ...], SamplingParams]:
    """The ids of eos_token_id, and sampling parameters with k2lite's defaults where the file is silent or
    null. Raises ConfigError."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return (), SamplingParams()
    given = {key: value for key, value in read_object(path).items() if value is not None}
    reader = KeyReader(path, given)
    default = SamplingParams()
    try:
        params = SamplingParams(
            temperature=reader.number("temperature", default=default.temperature, positive=False),
            top_k=reader.integer("top_k", default=default.top_k, at_least=0),
            top_p=reader.number("top_p", default=default.top_p),
            min_p=reader.number("min_p", default=default.min_p, positive=False),
        )
    except RequestError as error:
        raise ConfigError(f"{path}: {error}") from error
    return reader.integers("eos_token_id"), params
