"""Ctrl-C as a request: the step in hand is finished first."""

import signal
import threading


class StopRequest:
    """While it is entered, the first SIGINT or SIGTERM only sets `requested`; the second interrupts at once."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self.previous = {}
        # Python lets only the main thread handle signals
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
