"""The KV cache: what it holds, what growing costs, a fixed room, cropping and selecting rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_core.models import KVCache

LAYERS = 2


def tokens(count: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, T, D) of new tokens."""
    return torch.randn(rows, 3, count, 4), torch.randn(rows, 3, count, 4)


def fill(cache: KVCache, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Append pieces of a text to every layer; return all keys and values of the last layer."""
    for layer in range(LAYERS):
        pieces = [tokens(count) for count in counts]
        for key, value in pieces:
            cache.update(layer, key, value)
    return torch.cat([k for k, _ in pieces], 2), torch.cat([v for _, v in pieces], 2)


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    capacity=st.integers(1, 9),
    block=st.integers(1, 9),
)
def test_it_returns_all_that_it_was_given(counts: list[int], capacity: int, block: int) -> None:
    cache, pieces = KVCache(capacity, block), [tokens(count) for count in counts]
    for at, (key, value) in enumerate(pieces):
        keys, values = cache.update(0, key, value)
        assert torch.equal(keys, torch.cat([k for k, _ in pieces[: at + 1]], 2))
        assert torch.equal(values, torch.cat([v for _, v in pieces[: at + 1]], 2))
    assert cache.length == sum(counts)


@given(block=st.integers(1, 40), first=st.integers(1, 50), capacity=st.integers(1, 60))
def test_room_and_copying_keep_to_their_bounds(block: int, first: int, capacity: int) -> None:
    cache, copied, room = KVCache(capacity, block), 0, 0
    for length in range(first, 400):
        cache.update(0, *(torch.zeros(1, 1, first if length == first else 1, 1) for _ in "kv"))
        if room and cache.room != room:
            copied += length - 1
        room = cache.room
        assert length <= room < max(capacity + 1, 1.25 * length + block)
        assert copied <= 5 * length


def test_a_fixed_cache_writes_in_place(poison: None) -> None:
    cache = KVCache(8, 8)
    held = fill(cache, [5])
    cache.fix()
    assert cache.fixed is not None
    position, room = cache.fixed
    assert (int(position), room) == (5, 8)
    for _ in range(3):
        key, value = tokens(1)
        held = torch.cat((held[0], key), 2), torch.cat((held[1], value), 2)
        before = cache.update(1, key, value)
        cache.update(0, *tokens(1))
        position += 1
        cache.advance()
        # what lies behind is zero: a NaN there would outlive its weight of 0
        for found, wanted in zip(before, held, strict=True):
            assert torch.equal(found[:, :, : cache.length], wanted)
            assert not found[:, :, cache.length :].any()
    assert cache.length == room
    cache.fix()  # full: more room, at the same position's address
    assert cache.fixed[1] == 16
    assert cache.fixed[0] is position
    assert int(position) == 8
    assert torch.equal(cache.update(1, *tokens(1))[0][:, :, :8], held[0])


def test_a_position_is_an_address_that_stays(poison: None) -> None:
    cache = KVCache(4, 4)
    fill(cache, [1])
    cache.fix()
    first = cache.update(0, *tokens(1))
    cache.advance()
    second = cache.update(0, *tokens(1))
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    assert first[0].shape == second[0].shape == (2, 3, 4, 4)


def test_cropping_forgets_and_zeroes(poison: None) -> None:
    cache = KVCache(8, 8)
    keys, values = fill(cache, [6])
    cache.crop(2)
    assert (cache.length, cache.held, cache.fixed) == (2, 2, None)
    key, value = tokens(3)
    found = cache.update(1, key, value)
    assert torch.equal(found[0], torch.cat((keys[:, :, :2], key), 2))
    assert torch.equal(found[1], torch.cat((values[:, :, :2], value), 2))
    cache.crop(2)
    cache.fix()
    assert not cache.update(1, *tokens(1))[0][:, :, 3:].any()


def test_a_forward_that_broke_off_can_be_cropped() -> None:
    cache = KVCache()
    keys, _ = fill(cache, [6])
    cache.update(0, *tokens(2))  # the second layer never came
    assert (cache.length, cache.held) == (8, 6)
    with pytest.raises(ValueError, match="from 0 to the 6 tokens held; got 7"):
        cache.crop(7)
    cache.crop(6)
    assert torch.equal(cache.update(1, *tokens(1))[0][:, :, :6], keys)


def test_rows_are_selected() -> None:
    cache = KVCache()
    keys, values = fill(cache, [6])
    cache.select(torch.tensor([1, 1, 0]))
    found = cache.update(1, *tokens(1, rows=3))
    assert torch.equal(found[0][:, :, :6], keys[[1, 1, 0]])
    assert torch.equal(found[1][:, :, :6], values[[1, 1, 0]])


def test_refusals() -> None:
    for options, name in (({"capacity": 0}, "capacity"), ({"block": 0}, "block")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
            KVCache(**options)
    with pytest.raises(ValueError, match="an empty cache cannot be fixed: run the prompt first"):
        KVCache().fix()
    cache = KVCache()
    fill(cache, [2])
    with pytest.raises(ValueError, match=r"holds 2 rows, got keys of 3.*`select`"):
        cache.update(0, *tokens(1, rows=3))
    with pytest.raises(ValueError, match="to the 2 tokens held; got -1"):
        cache.crop(-1)
    cache.fix()
    with pytest.raises(ValueError, match="takes one token at a time; got 2"):
        cache.update(0, *tokens(2))
