"""Ctrl-C that lets the step finish: a step that was cut short is in no state to be saved."""

import signal
import threading
from typing import Any

from lora_core.train.report import say


class Interrupts:
    """Within the block Ctrl-C and SIGTERM end the run after the step; a second one, at once."""

    def __init__(self) -> None:
        self.asked = False

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
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
