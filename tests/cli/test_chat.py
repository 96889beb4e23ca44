"""`k2lite chat` in a real pseudo-terminal: several turns, Ctrl-C in an answer, editing, the end."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPO

WAIT_S = 60.0
CTRL_C, CTRL_D = "\x03", "\x04"
# Makes standard input the terminal that Ctrl-C comes from and lets the signal through, whatever the tests' own parent
# did with it; then becomes the command.
_OWN_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A chat running on its own terminal."""

    def __init__(self, *arguments: str, home: Path) -> None:
        self._master, slave = pty.openpty()
        env = {**os.environ, "XDG_STATE_HOME": str(home), "TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _OWN_TERMINAL, sys.executable, "-m", "k2lite", "chat", *arguments],
            cwd=REPO,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Read until the pattern shows after what was read before; returns what came."""
        end, text = time.monotonic() + WAIT_S, ""
        while not re.search(pattern, text):
            assert time.monotonic() < end, f"{pattern!r} did not come; seen: {self.seen + text!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                text += os.read(self._master, 65536).decode(errors="replace")
        self.seen += text
        return text

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(demo: Path, tmp_path: Path) -> Iterator[Terminal]:
    chat = Terminal(str(demo), "--seed", "1", "--max-tokens", "200", home=tmp_path)
    yield chat
    chat.close()


def test_a_conversation(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for(r"> $")
    terminal.type("helllo\x7f\x7fo there\n")  # backspace edits the line
    terminal.wait_for(r"\n> $")
    terminal.type("\x1b[A")  # arrow up recalls it
    terminal.wait_for("hello there")
    time.sleep(0.3)  # CPython loses a signal that comes while readline draws
    terminal.type(CTRL_C)  # Ctrl-C at the prompt drops the line
    terminal.wait_for(r"> $")
    terminal.type("tell me a very long story\n")
    terminal.wait_for(r"story\r\n.")
    terminal.type(CTRL_C)
    terminal.wait_for(r"\[stopped\]\s+> $")
    assert terminal.process.poll() is None
    terminal.type("/reset\n")
    terminal.wait_for(r"> $")
    terminal.type(CTRL_D)
    assert terminal.process.wait(timeout=WAIT_S) == 0
    assert "Traceback" not in terminal.seen
    assert "hello there" in (tmp_path / "k2lite" / "chat_history").read_text()


def test_a_conversation_longer_than_the_context_says_so_and_goes_on(demo: Path, tmp_path: Path) -> None:
    chat = Terminal(str(demo), "--context", "64", "--max-tokens", "8", home=tmp_path)
    try:
        chat.wait_for(r"> $")
        chat.type("x" * 80 + "\n")
        chat.wait_for(r"the context holds\s+64[^>]*> $")
        chat.type("/exit\n")
        assert chat.process.wait(timeout=WAIT_S) == 0
    finally:
        chat.close()
