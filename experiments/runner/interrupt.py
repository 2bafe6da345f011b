"""Ctrl-C and SIGTERM as a request: the running trial saves its state at the next step boundary, then stops."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interrupted(Exception):  # noqa: N818 - not an error: the user asked for it
    """The user asked to stop and everything that was done is on disk."""


class Interrupt:
    """Context manager that turns the first SIGINT or SIGTERM into a flag; the second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses to set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def check(self, where: str) -> None:
        """Raise `Interrupted` if a stop was requested."""
        if self.requested:
            raise Interrupted(where)
