"""An answer's two halves: what the model thought and what it said. History needs them apart: templates drop old
thoughts, and a thought left in the content would come back to the model as if it had been said.
"""

from __future__ import annotations

BEGIN, END = "<think>", "</think>"


def assistant_message(answer: str, prompt: str) -> dict[str, str]:
    """The message that an answer to `prompt` (the rendered text) becomes in the conversation that goes on. Only for
    models that have these tokens; to others <think> is a word."""
    thinks_already = prompt.rstrip().endswith(BEGIN)  # K2.5 and later; K2-Thinking writes the token itself
    if not thinks_already and not answer.lstrip().startswith(BEGIN):
        return {"role": "assistant", "content": answer}
    thought = answer if thinks_already else answer.lstrip().removeprefix(BEGIN)
    reasoning, _, content = thought.partition(END)
    return {"role": "assistant", "content": content, "reasoning_content": reasoning}
