"""llama.cpp's side: greedy answers and the logits of each step. Runs in an environment of its own, which holds
llama-cpp-python and numpy and need not hold k2lite.

    python peer.py REQUEST.json OUT.npz

The request names the file, prompts (ids), how many tokens to write, the settings of `Llama`, and f16 or f32 as the type
of its cache. OUT has ids [prompts, tokens] and logits [prompts, tokens, vocab]. An end token ends nothing here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

GGML_F32, GGML_F16 = 0, 1


def main() -> int:
    from llama_cpp import Llama  # type: ignore[import-not-found]

    request = json.loads(Path(sys.argv[1]).read_text())
    cache = GGML_F16 if request["cache"] == "f16" else GGML_F32
    llama = Llama(request["file"], type_k=cache, type_v=cache, verbose=False, **request["settings"])
    answers = [answer(llama, prompt, request["tokens"]) for prompt in request["prompts"]]
    ids, logits = zip(*answers, strict=True)
    np.savez(sys.argv[2], ids=np.array(ids), logits=np.array(logits))
    return 0


def answer(llama: Any, prompt: list[int], tokens: int) -> tuple[list[int], np.ndarray]:
    """The likeliest token each time, and the logits [tokens, vocab] that it was chosen by."""
    import llama_cpp

    llama.reset()
    llama.eval(prompt)
    ids: list[int] = []
    rows = []
    while True:
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),)).copy()
        rows.append(row)
        ids.append(int(row.argmax()))
        if len(ids) == tokens:
            return ids, np.array(rows, dtype=np.float32)
        llama.eval(ids[-1:])


if __name__ == "__main__":
    sys.exit(main())
