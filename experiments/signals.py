"""SIGTERM and Ctrl-C: the first asks a run for a checkpoint and an end, a second Ctrl-C ends at once."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

STATUS = 128  # what a shell adds to the number of the signal that ended a process
MESSAGE = b"\nstopping after a checkpoint; Ctrl-C ends at once\n"


class StopRequest:
    """Inside its ``with`` block, signals become a question that a run asks whenever it could stop.

    While nobody has asked yet (data is read, the program compiles) there is nothing to save, and the signal raises
    ``KeyboardInterrupt``. Only the main thread can take signals; elsewhere this does nothing.

    Attributes:
      signal: The first signal that came.
    """

    def __init__(self):
        self.signal: int | None = None
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and shells in the background set it
                    self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __call__(self) -> bool:
        """Whether to stop now."""
        self._asked = True
        return self.signal is not None

    @property
    def status(self) -> int:
        """Exit status of a process that this ended: 143 after SIGTERM, 130 after Ctrl-C."""
        return STATUS + (self.signal or signal.SIGINT)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            return  # launchers send SIGTERM twice; a second Ctrl-C does not come here
        self.signal = number
        if signal.SIGINT in self._previous:
            # The system's own handler, because one in Python would wait for compiled code to return.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self._asked:
            raise KeyboardInterrupt
        os.write(2, MESSAGE)  # print could meet itself, halfway through a line
