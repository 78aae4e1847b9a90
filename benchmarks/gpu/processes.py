"""Processes that may crash, hang or outlast their time: what they print, line by line, and their certain end."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


class OutOfTime(Exception):
    """A process has not ended, or has said nothing, when it should have."""


class Process:
    """A command in a process group of its own, which ends with the block."""

    def __init__(self, command: list[str], cwd: Path, environment: dict[str, str] | None = None, errors=None):
        self.command, self.cwd, self.environment, self.errors = command, cwd, environment, errors

    def __enter__(self) -> Process:
        self.process = subprocess.Popen(
            self.command,
            cwd=self.cwd,
            env=os.environ | (self.environment or {}),
            stdout=subprocess.PIPE,
            stderr=self.errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *error) -> None:
        self._end(signal.SIGTERM, 3.0)
        self._end(signal.SIGKILL, None)
        self.process.stdout.close()

    def _end(self, number: int, seconds: float | None) -> None:
        try:
            os.killpg(self.process.pid, number)
            self.process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass

    def lines(self, end: float, silence: float = float("inf")) -> Iterator[str]:
        """What it prints until it closes its output. Raises OutOfTime at `end`, or after `silence` seconds of nothing.

        end: by time.monotonic()
        """
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                left = min(end - time.monotonic(), silence)
                if left <= 0 or not selector.select(left):
                    raise OutOfTime
                data = os.read(self.process.stdout.fileno(), 65536)
                if not data:
                    break
                *whole, rest = (rest + data).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
        if rest:
            yield rest.decode(errors="replace")

    def code(self) -> int:
        """Its exit code, once it has closed its output; that of a signal is negative."""
        return self.process.wait(10)
