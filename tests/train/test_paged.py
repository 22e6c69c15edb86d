"""AdamW whose state is paged: torch's fused AdamW bit for bit, and the order of its copies."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_core.device import Lanes
from lora_core.train import PagedAdamW
from lora_core.train.paged import ALIGNED, CUT, fill_buckets

SMALLEST = 8 * CUT


class LateLanes:
    """Copies that are made as late as what waits for them allows; `log` holds the order.

    Each lane is a queue. Waiting for a copy makes it, what stands before it in its lane, and what
    those wait for; whatever nobody waits for is not made before `finish`. So a wait that is missing
    is a copy that comes too late.
    """

    def __init__(self, forget: str = "") -> None:
        self.queues: dict[str, list[tuple[int, Callable[[], Any], list[Any]]]] = {
            "in": [],
            "out": [],
        }
        self.log: list[str] = []
        self.made: set[int] = set()
        self.count = 0
        self.forget = forget  # which waits to leave out

    def host_zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape)

    def device_empty(self, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan)

    def _add(self, lane: str, to: Tensor, source: Tensor, after: Sequence[Any]) -> tuple[str, int]:
        self.count += 1
        waits = [] if lane == self.forget else [event for event in after if event is not None]
        self.queues[lane].append((self.count, lambda: to.copy_(source), waits))
        self.log.append(f"{lane} {[number for _, number in waits]}")
        return lane, self.count

    def copy_in(self, to: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        return self._add("in", to, source, after)

    def copy_out(self, to: Tensor, source: Tensor, after: Sequence[Any]) -> Any:
        return self._add("out", to, source, after)

    def mark(self) -> Any:
        """The computation here is done at once."""
        self.count += 1
        self.made.add(self.count)
        self.log.append(f"mark {self.count}")
        return "main", self.count

    def wait(self, event: Any) -> None:
        if self.forget != "wait":
            self._make(event)

    def finish(self, event: Any) -> None:
        if event is not None:
            self._make(event)

    def _make(self, event: tuple[str, int]) -> None:
        lane, number = event
        while number not in self.made:
            first, copy, waits = self.queues[lane].pop(0)
            for other in waits:
                self._make(other)
            copy()
            self.made.add(first)


def parameters(sizes: Sequence[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in sizes]


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    half = (len(params) + 1) // 2
    made: list[dict[str, Any]] = [{"params": params[:half], "weight_decay": 0.1}]
    rest = {"params": params[half:], "lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.0}
    return made + ([rest] if params[half:] else [])


def give(a: list[nn.Parameter], b: list[nn.Parameter], step: int, skip: bool) -> None:
    """The same random gradients; some parameters get none now and then."""
    generator = torch.Generator().manual_seed(step)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        g = torch.randn(x.shape, generator=generator)
        left_out = skip and (i + step) % 3 == 0
        x.grad, y.grad = (None, None) if left_out else (g, g.clone())


def compare(sizes: list[tuple[int, ...]], lanes: Any, buckets: int = 1, skip: bool = True) -> bool:
    """Whether four steps are torch's, bit for bit, state included."""
    a, b = parameters(sizes), parameters(sizes)
    theirs = torch.optim.AdamW(groups(a), lr=1e-3, fused=True)
    ours = PagedAdamW(groups(b), lr=1e-3, bucket_bytes=buckets * SMALLEST, lanes=lanes)
    for step in range(4):
        give(a, b, step, skip)
        theirs.step()
        ours.step()
    state, wanted = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert state.keys() == wanted.keys()
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and all(
        torch.equal(state[i]["mean"], wanted[i]["exp_avg"])
        and torch.equal(state[i]["square"], wanted[i]["exp_avg_sq"])
        and state[i]["step"] == wanted[i]["step"]
        for i in wanted
    )


LARGE = [(3,), (100, 77), (9000,), (4096,), (5, 5), (20_000,), (0,)]


@given(
    st.lists(st.integers(0, 9_000).map(lambda n: (n,)), min_size=1, max_size=5),
    st.integers(1, 3),
    st.booleans(),
)
def test_torchs_fused_adamw_bit_for_bit(
    sizes: list[tuple[int, ...]], buckets: int, late: bool
) -> None:
    assert compare(sizes, LateLanes() if late else None, buckets)


@pytest.mark.parametrize("forget", ["in", "wait"])
def test_a_wait_left_out_would_be_seen(forget: str) -> None:
    assert compare(LARGE, LateLanes())
    assert not compare(LARGE, LateLanes(forget), skip=False)


def test_the_order_of_copies() -> None:
    lanes, params = LateLanes(), parameters([(4 * CUT,)])
    optimizer = PagedAdamW(params, bucket_bytes=SMALLEST, lanes=lanes)
    params[0].grad = torch.ones(4 * CUT)
    optimizer.step()
    # the next bucket's copy in begins before this one's copy out, which waits for the update; a
    # copy in waits for the copy out of the buffer that it takes
    assert lanes.log == [
        *("mark 1", "in [1]", "in [1]", "mark 4", "out [4]"),
        *("in [5]", "mark 7", "out [7]", "in [8]", "mark 10", "out [10]", "mark 12", "out [12]"),
    ]
    assert len(optimizer.staging) == 2
    assert all(buffer.numel() == 2 * CUT for buffer in optimizer.staging)


@given(st.lists(st.integers(0, 30_000), min_size=1, max_size=8), st.integers(1, 4))
def test_buckets_hold_each_element_once(sizes: list[int], room: int) -> None:
    params = [torch.empty(n, device="meta") for n in sizes]
    found = fill_buckets(0, params, room * CUT)
    elements = {id(p): 0 for p in params}
    for bucket in found:
        end = 0
        assert bucket.size <= room * CUT
        for piece in bucket.pieces:
            assert piece.at >= end
            assert piece.at % ALIGNED == 0
            assert piece.first == elements[id(piece.param)]
            assert piece.first % CUT == 0
            end = piece.at + piece.last - piece.first
            elements[id(piece.param)] = piece.last
        assert end == bucket.size
    assert list(elements.values()) == sizes


def test_state_survives_and_another_bucket_size_reads_it() -> None:
    a, b = parameters(LARGE), parameters(LARGE)
    first = PagedAdamW(groups(a), bucket_bytes=SMALLEST)
    for step in range(3):
        give(a, b, step, skip=False)
        first.step()
    with torch.no_grad():
        for x, y in zip(a, b, strict=True):
            y.copy_(x)
    second = PagedAdamW(groups(b), lr=7.0, bucket_bytes=4 * SMALLEST)
    give(b, b, 9, skip=False)
    second.load_state_dict(first.state_dict())
    for step in range(3, 6):
        give(a, b, step, skip=True)
        first.step()
        second.step()
    assert all(map(torch.equal, a, b))
    one, other = first.state_dict(), second.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for number, state in one["state"].items():
        assert torch.equal(state["mean"], other["state"][number]["mean"])


def test_refusals() -> None:
    params = parameters([(5,)])
    with pytest.raises(ValueError, match="bucket_bytes must be 32768 or more; got 100"):
        PagedAdamW(params, bucket_bytes=100)
    with pytest.raises(ValueError, match="one device; got cpu, meta"):
        PagedAdamW([*params, nn.Parameter(torch.empty(3, device="meta"))])
    optimizer = PagedAdamW(params)
    params[0].grad = torch.ones(5)
    optimizer.step()
    other = PagedAdamW(parameters([(6,)]))
    with pytest.raises(ValueError, match=r"state of parameter 0 is .*float32 \(5,\).* PagedAdamW"):
        other.load_state_dict(optimizer.state_dict())


def test_lanes_of_a_cpu_copy_at_once() -> None:
    lanes = Lanes("cpu")
    host, device = lanes.host_zeros(2, 3), lanes.device_empty(2, 3)
    assert not host.is_pinned()
    assert lanes.copy_in(device, host, ()) is None
    assert torch.equal(device, torch.zeros(2, 3))
    device.fill_(4)
    lanes.wait(lanes.mark())
    lanes.finish(lanes.copy_out(host, device, ()))
    assert torch.equal(host, torch.full((2, 3), 4.0))
