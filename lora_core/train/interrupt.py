"""Ctrl-C that lets the step finish: a step that was cut short is in no state to be saved."""

import signal
import threading
import time
from typing import Any

from lora_core.train.report import say

# torchrun passes a signal on to processes that the terminal has sent it to already
ECHO = 2.0  # seconds in which a second one is the same


class Interrupts:
    """Within the block Ctrl-C and SIGTERM end the run after the step; a second one, at once.

    Args:
        speaks: whether to tell the user.
        echoes: whether one signal may come twice.
    """

    def __init__(self, speaks: bool = True, echoes: bool = False) -> None:
        self.asked = False
        self.speaks = speaks
        self.patience = ECHO if echoes else 0.0
        self.since = 0.0

    def _ask(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.asked and now - self.since >= self.patience:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked, self.since = True, now
            if self.speaks:
                say("interrupted: finishing this step and saving; once more stops at once")

    def __enter__(self) -> "Interrupts":
        self.previous: dict[int, Any] = {}
        # only the main thread may set handlers; elsewhere Ctrl-C is not ours to take
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
