"""A peer that is measured beside k2lite: a Python of its own, which runs a script that answers each line of stdin with
seconds on stdout. It takes turns with what it is compared to, so that both see the same minutes. Between its turns it
is stopped: threads that spin while they wait for work would take the cores from the other."""

from __future__ import annotations

import os
import signal
import subprocess
from types import TracebackType


class Peer:
    """`python` (an interpreter's path) runs `script` with arguments. extra_path: for modules it would not find."""

    def __init__(self, python: str, script: str, *arguments: str, extra_path: str | None = None) -> None:
        environment = {**os.environ, **({"PYTHONPATH": extra_path} if extra_path else {})}
        self._process = subprocess.Popen(
            [python, "-c", script, *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, request: int) -> float:
        """What the script says to a number. Raises RuntimeError if it has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the peer has no pipes")
        self._process.send_signal(signal.SIGCONT)
        stdin.write(f"{request}\n")
        stdin.flush()
        line = stdout.readline()
        self._process.send_signal(signal.SIGSTOP)
        if not line:
            self._process.send_signal(signal.SIGCONT)
            raise RuntimeError(f"the peer ended with code {self._process.wait()}; what it said is above")
        return float(line)

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.communicate()
