"""Hold a conversation in the terminal.

Ctrl-C stops an answer and keeps what was said; Ctrl-D or /exit ends the program; /reset begins anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from k2lite.errors import K2LiteError, one_line
from k2lite.text.reasoning import END, assistant_message

from .model_options import (
    add_model_arguments,
    add_sampling_arguments,
    add_statistics_argument,
    check_sampling_arguments,
    keep_statistics,
    load_engine,
    sampling_params,
)

if TYPE_CHECKING:
    from k2lite.sampling import SamplingParams
    from k2lite.session import Session

PROMPT = "> "
HELP = "/reset forgets the conversation, /exit (or Ctrl-D) ends, Ctrl-C stops an answer, arrow keys edit and recall"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    add_statistics_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message (default: the template's own)")


def execute(args: argparse.Namespace) -> int:
    from k2lite.session import Session

    check_sampling_arguments(args)
    engine = load_engine(args, forecast=True)
    params = sampling_params(args, engine)
    session = Session(engine)
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    engine.tokenizer.render(
        [{"role": "user", "content": "x"}]
    )  # a folder that can't chat says so before the first line
    messages = list(start)
    # only where both are a terminal does Python edit lines, and keep the prompt off stdout
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    print(HELP, file=sys.stderr)
    with _line_history() if interactive else nullcontext():
        while True:
            try:
                line = _read_line(interactive)
                if line is None or line in ("/exit", "/quit"):
                    keep_statistics(args, engine)
                    return 0
                if line == "/reset":
                    messages = list(start)
                elif line in ("/help", "/?"):
                    print(HELP, file=sys.stderr)
                elif line:
                    _turn(session, messages, line, params, args)
            except KeyboardInterrupt:  # at the prompt, or pressed twice in an answer
                print(file=sys.stderr)


def _turn(
    session: Session, messages: list[dict[str, str]], line: str, params: SamplingParams, args: argparse.Namespace
) -> None:
    """Say one line, print the answer, and keep both. A turn that fails leaves the conversation as it was."""
    said = [*messages, {"role": "user", "content": line}]
    tokenizer = session.engine.tokenizer
    try:
        prompt = tokenizer.render(said)
        answer = session.answer(prompt.ids, params, max_tokens=args.max_tokens, stop=tuple(args.stop))
    except K2LiteError as error:
        print(f"k2lite chat: {one_line(error)} (/reset begins anew)", file=sys.stderr)
        return
    stopped = False
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    except K2LiteError as error:
        print(f"\nk2lite chat: {one_line(error)}", file=sys.stderr)
        return
    thinks = END in tokenizer.special_tokens
    reply = assistant_message(answer.text, prompt.text) if thinks else {"role": "assistant", "content": answer.text}
    messages[:] = [*said, reply]
    if stopped:
        print(" [stopped]", end="", file=sys.stderr)
    print(flush=True)


def _read_line(interactive: bool) -> str | None:
    """A line from the user, None at the end of input. Lines from a pipe are asked for by no prompt."""
    try:
        if interactive:
            return input(PROMPT).strip()
        if sys.stdin.isatty():
            print(PROMPT, end="", file=sys.stderr, flush=True)
        return input().strip()
    except EOFError:
        if interactive:
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
