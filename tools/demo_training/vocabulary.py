"""The demo's tokenizer: byte-pair merges learned on the training mix, written in Kimi's own file format.

The split pattern is Kimi's, and inside its pieces a word has the same tokens wherever it stands: `ball`, `_ball`,
`.ball` and ` ball` share theirs, so that a model learns to copy a name by matching the token before it. Merges join
letters with letters only; the space before a common word joins last of all, behind every merge inside the word. Digits
are never merged, so that a number is read digit by digit.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from k2lite.text.byte_tokenizer import own_template
from k2lite.text.hf_tokenizer import byte_of_character
from k2lite.text.kimi_tokenizer import CONTROL_SLOTS, DEFAULT_CONTROL_TOKENS, SPLIT_PATTERN, TOOL_SLOTS

N_SPACED_WORDS = 512
LETTERS = r"\p{L}[\p{L}\p{M}]*"


def train_vocabulary(texts: Collection[str], n_vocab: int, unspaced: Collection[str]) -> list[bytes]:
    """Token bytes by rank: the 256 bytes, merges in the order they were learned, then the most frequent words of one
    token with a space before them. Words in `unspaced` and single letters that may begin a name get no such token."""
    merged = learn_merges(texts, n_vocab - CONTROL_SLOTS - N_SPACED_WORDS)
    known = set(merged)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r" ([a-zA-Z]+)", text))
    for word in {word for word in counts if len(word) == 1} - {"a", "A", "I"} | set(unspaced):
        counts.pop(word, None)
    words = (word for word, _ in counts.most_common() if word.encode() in known)
    return [*merged, *(b" " + word.encode() for word in islice(words, N_SPACED_WORDS))]


def learn_merges(texts: Iterable[str], n_tokens: int) -> list[bytes]:
    """The 256 bytes, then merges in the order they were learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.Split(Regex(LETTERS), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    table = byte_of_character()
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(table[character] for character in text) for text, _ in by_id]
    singles = sorted(token for token in tokens if len(token) == 1)
    return [*singles, *(token for token in tokens if len(token) > 1)]


def write_vocabulary(folder: Path, tokens: list[bytes]) -> None:
    """tiktoken.model, tokenizer_config.json and chat_template.jinja."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tiktoken.model").write_text("".join(lines), encoding="ascii")
    names = {
        str(len(tokens) + slot): {"content": name, "special": slot not in TOOL_SLOTS}
        for slot, name in DEFAULT_CONTROL_TOKENS.items()
    }
    config = {
        "added_tokens_decoder": names,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "tokenizer_class": "TikTokenTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(own_template(), encoding="utf-8")
