"""A call captured as a CUDA graph: when it runs, when it is replayed, what happens if it fails.

There is no GPU here: torch.cuda is played by a stand-in that keeps a record, and whose graph makes
the captured calls again when it is replayed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_core import device
from lora_core.device import recorded

CUDA = torch.device("cuda")


class Cuda:
    """What `Recorded` uses of torch.cuda."""

    def __init__(self, *, fails: str | None = None) -> None:
        self.said: list[str] = []
        self.fails = fails
        self.capturing: list[Callable[[], None]] | None = None
        outer = self

        class Graph:
            def __init__(self) -> None:
                self.calls: list[Callable[[], None]] = []

            def replay(self) -> None:
                outer.said.append("replay")
                for call in self.calls:
                    call()

        self.CUDAGraph = Graph

    def Stream(self, _: Any) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self, _: Any) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def set_stream(self, _: Any) -> None:
        self.said.append("set_stream")

    @contextmanager
    def device(self, _: Any) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, _: Any) -> Iterator[None]:
        self.said.append("side")
        yield

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.said.append("capture")
        self.capturing = graph.calls
        try:
            yield
            if self.fails:
                raise RuntimeError(self.fails)
        finally:
            self.capturing = None

    def launch(self, call: Callable[[], None]) -> None:
        """A kernel: written down within a capture, and not run."""
        if self.capturing is None:
            call()
        else:
            self.capturing.append(call)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    monkeypatch.setattr(device.torch, "cuda", fake)
    return fake


def test_each_call_has_its_effect_once(cuda: Cuda) -> None:
    total, python = [0], [0]

    def step() -> None:
        python[0] += 1
        cuda.launch(lambda: total.__setitem__(0, total[0] + 1))

    run = recorded(step, CUDA)
    for calls in range(1, 6):
        run()
        assert total == [calls]
    assert python == [2]  # the first call, and the capture
    assert cuda.said == ["side", "capture", "replay", "replay", "replay", "replay"]


def test_what_cannot_be_captured_goes_on_as_it_is_and_says_so(cuda: Cuda) -> None:
    cuda.fails = "operation not permitted when stream is capturing\nmore"
    total = [0]
    run = recorded(lambda: cuda.launch(lambda: total.__setitem__(0, total[0] + 1)), CUDA)
    run()
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted when"):
        run()
    run()
    assert total == [3]
    assert cuda.said == ["side", "capture", "set_stream"]


def test_elsewhere_the_call_is_the_call() -> None:
    def step() -> None: ...

    assert recorded(step, torch.device("cpu")) is step
