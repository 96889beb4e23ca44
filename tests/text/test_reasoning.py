"""What an answer becomes in the conversation that goes on: thoughts apart from words."""

from __future__ import annotations

import pytest

from k2lite.text.reasoning import assistant_message

PLAIN = "...<|im_middle|>"


@pytest.mark.parametrize(
    ("prompt", "answer", "content", "reasoning"),
    [
        (PLAIN, "words", "words", None),
        (PLAIN, "words about <think> and </think>", "words about <think> and </think>", None),
        (PLAIN, "<think>why</think>words", "words", "why"),  # K2-Thinking writes the token itself
        (PLAIN, "<think>stopped here", "", "stopped here"),
        (PLAIN + "<think>", "why</think>words", "words", "why"),  # K2.5: the prompt ends in it
        (PLAIN + "<think>\n", "why</think>\n\nwords", "\n\nwords", "why"),  # R1
        (PLAIN + "<think></think>", "words", "words", None),  # thinking switched off
    ],
)
def test_thoughts_and_words(prompt: str, answer: str, content: str, reasoning: str | None) -> None:
    expected = {"role": "assistant", "content": content}
    if reasoning is not None:
        expected["reasoning_content"] = reasoning
    assert assistant_message(answer, prompt) == expected
