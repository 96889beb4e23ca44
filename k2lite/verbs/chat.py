"""Hold a conversation in the terminal.

Ctrl-C stops an answer and keeps what was said; Ctrl-D or /exit ends the program; /reset begins anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from k2lite.quant.errors import K2LiteError

from .model_options import add_model_arguments, add_sampling_arguments, load_engine, sampling_params

if TYPE_CHECKING:
    from k2lite.sampling import SamplingParams
    from k2lite.session import Session

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends, Ctrl-C stops an answer, arrow keys edit and recall"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: the template's own)")


def execute(args: argparse.Namespace) -> int:
    from k2lite.session import Session

    engine = load_engine(args)
    params = sampling_params(args, engine)
    session = Session(engine)
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    print(HELP, file=sys.stderr)
    with _line_history():
        while (line := _read_line()) is not None:
            if line in ("/exit", "/quit"):
                break
            if line == "/reset":
                messages = list(start)
            elif line in ("/help", "/?"):
                print(HELP, file=sys.stderr)
            elif line:
                _turn(session, messages, line, params, args)
    return 0


def _turn(
    session: Session, messages: list[dict[str, str]], line: str, params: SamplingParams, args: argparse.Namespace
) -> None:
    """Say one line, print the answer, and keep both. A turn that fails leaves the conversation as it was."""
    messages.append({"role": "user", "content": line})
    try:
        ids = session.engine.tokenizer.render(messages).ids
        answer = session.answer(ids, params, max_tokens=args.max_tokens, stop=tuple(args.stop))
    except K2LiteError as error:
        messages.pop()
        print(f"k2lite chat: {error} (/reset begins anew)", file=sys.stderr)
        return
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr)
    except K2LiteError as error:
        messages.pop()
        print(f"\nk2lite chat: {error}", file=sys.stderr)
        return
    print()
    messages.append({"role": "assistant", "content": answer.text})


def _read_line() -> str | None:
    """A line from the user, None at the end of input. Ctrl-C at the prompt drops the line, not the program."""
    while True:
        try:
            return input("> ").strip()
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return None


@contextmanager
def _line_history() -> Iterator[None]:
    """Line editing and recall through readline, kept between conversations."""
    try:
        import readline
    except ImportError:  # not on every platform: input() still reads lines
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = state / "k2lite" / "chat_history"
    try:
        readline.read_history_file(file)
    except OSError:
        readline.clear_history()  # the first conversation here
    try:
        yield
    finally:
        readline.set_history_length(1000)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
        except OSError as error:
            print(f"k2lite chat: the line history was not kept: {error}", file=sys.stderr)
