"""Stop a run between two steps when the user or the machine asks for it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from byheart.errors import ByheartError

__all__ = ["StopSignals", "TrainingInterruptedError"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterruptedError(ByheartError):
    """Training was stopped by a signal after saving a checkpoint; it can be resumed."""


class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying, while it is active.

    A second SIGINT raises `KeyboardInterrupt` at once. Outside the main thread, where Python does
    not deliver signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the signal that came, if one did."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
