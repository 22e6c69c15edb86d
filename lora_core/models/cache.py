"""Keys and values of the tokens that were already seen, so that generation computes each once.

One buffer a layer. A full one is replaced by one 5/4 as long, rounded up to whole blocks, so

    memory    room <= 5/4 tokens + one block (or the capacity asked for): a fifth is idle at most
    copying   each growth copies less than the room before it, and rooms grow by 5/4 at least:
              together at most 5 tokens copied for each token held, where concatenating at each
              step copies n / 2 of them

Doubling would copy less (2 a token) and leave half of the memory idle; transformers' DynamicCache
concatenates, its StaticCache takes all of the longest text's memory at the start.

A cache can be *fixed* for a while (`fix`): `update` then writes the one new token at a position
that is a number on the device and returns the whole buffers. No shape and no address changes from
step to step, which is what a CUDA graph of the step needs; the caller's mask hides the unused
columns, and these hold zeros, since a hidden NaN would still be one after the product with its
weight of 0. When the room is used up the caller fixes the cache anew, in longer buffers.

The cache knows nothing of padding: the attention mask that goes with it covers past and new tokens.
"""

import torch
from torch import Tensor


class KVCache:
    """Growing key and value buffers, one pair a layer.

    Args:
        capacity: tokens to make room for at first; more are made when needed.
        block: room is a multiple of so many tokens once it has grown.

    Raises:
        ValueError: capacity or block below 1.
    """

    def __init__(self, capacity: int = 64, block: int = 64) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1; got {capacity}")
        if block < 1:
            raise ValueError(f"block must be at least 1; got {block}")
        self._capacity, self._block = capacity, block
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: dict[int, int] = {}
        self._fixed: tuple[Tensor, int] | None = None

    @property
    def length(self) -> int:
        """Tokens held (by the first layer; between forwards by all of them)."""
        return self._lengths.get(0, 0)

    @property
    def held(self) -> int:
        """Tokens held by every layer: fewer than `length` only after a forward that broke off."""
        return min(self._lengths.values(), default=0)

    @property
    def room(self) -> int:
        """Tokens that the buffers have room for; 0 before the first update."""
        return self._layers[0][0].shape[2] if self._layers else 0

    @property
    def fixed(self) -> tuple[Tensor, int] | None:
        """None, or, of a fixed cache, the next token's position (int64, ()) and the room."""
        return self._fixed

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append to a layer and return all it holds.

        Args:
            layer: index of the layer.
            key: (B, H, T, D), new keys, already rotated.
            value: (B, H, T, D), new values.

        Returns:
            Keys and values (B, H, past + T, D), views of the buffers; of a fixed cache, which
            takes one token, the whole buffers (B, H, room, D).

        Raises:
            ValueError: several tokens for a fixed cache, or a batch of another size.
        """
        if self._fixed is not None:
            return self._write(layer, key, value)
        past = self._lengths.get(layer, 0)
        total = past + key.shape[2]
        if layer not in self._layers:
            room = max(self._blocks(total), self._capacity)
            self._layers[layer] = (_buffer(key, room), _buffer(value, room))
        keys, values = self._layers[layer]
        if len(keys) != len(key):
            raise ValueError(
                f"the cache holds {len(keys)} rows, got keys of {len(key)}: a batch keeps its "
                "rows, or drops some by `select`"
            )
        if total > keys.shape[2]:
            keys, values = self._grow(layer, total)
        keys[:, :, past:total] = key
        values[:, :, past:total] = value
        self._lengths[layer] = total
        return keys[:, :, :total], values[:, :, :total]

    def fix(self) -> None:
        """Keep shapes and addresses as they are from here on, with room for one token at least.

        The position's address stays the same when a cache is fixed again.

        Raises:
            ValueError: nothing is held yet.
        """
        if not self._layers:
            raise ValueError("an empty cache cannot be fixed: run the prompt first")
        length = self.length
        for layer, (keys, values) in self._layers.items():
            if length >= keys.shape[2]:
                keys, values = self._grow(layer, length + 1)  # noqa: PLW2901
            keys[:, :, length:] = 0
            values[:, :, length:] = 0
        if self._fixed is None:
            position = torch.tensor(length, device=self._layers[0][0].device)
        else:
            position = self._fixed[0].fill_(length)
        self._fixed = (position, self.room)

    def advance(self) -> None:
        """Count the token that every layer of a fixed cache has written at its position.

        This is the host's count alone; the position on the device is the step's to move.
        """
        self._lengths = {layer: length + 1 for layer, length in self._lengths.items()}

    def loosen(self) -> None:
        """Let a fixed cache grow again, and take any number of tokens."""
        self._fixed = None

    def crop(self, length: int) -> None:
        """Forget all tokens behind the first `length`; a fixed cache is loosened.

        Args:
            length: tokens to keep; after a forward that did not end, what all layers hold.

        Raises:
            ValueError: a layer holds fewer, or a negative length.
        """
        if not 0 <= length <= self.held:
            raise ValueError(f"length must be from 0 to the {self.held} tokens held; got {length}")
        self.loosen()
        self._lengths = dict.fromkeys(self._lengths, length)

    def select(self, rows: Tensor) -> None:
        """Keep some rows of the batch, in this order; a fixed cache is loosened.

        Args:
            rows: (R,) int64, which; a row may come more than once.
        """
        self.loosen()
        for layer, (keys, values) in self._layers.items():
            rows = rows.to(keys.device)
            self._layers[layer] = (keys.index_select(0, rows), values.index_select(0, rows))

    def _write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put one token at the position that the device knows."""
        assert self._fixed is not None
        if key.shape[2] != 1:
            raise ValueError(f"a fixed cache takes one token at a time; got {key.shape[2]}")
        keys, values = self._layers[layer]
        at = self._fixed[0].view(1)
        keys.index_copy_(2, at, key.to(keys.dtype))
        values.index_copy_(2, at, value.to(values.dtype))
        return keys, values

    def _grow(self, layer: int, total: int) -> tuple[Tensor, Tensor]:
        """Move a layer to buffers for at least `total` tokens."""
        past, old = self._lengths[layer], self._layers[layer]
        room = self._blocks(max(total, -(-old[0].shape[2] * 5 // 4)))
        keys, values = (_buffer(tensor, room) for tensor in old)
        keys[:, :, :past] = old[0][:, :, :past]
        values[:, :, :past] = old[1][:, :, :past]
        self._layers[layer] = (keys, values)
        return keys, values

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block) * self._block


def _buffer(like: Tensor, room: int) -> Tensor:
    batch, heads, _, dim = like.shape
    return torch.empty(batch, heads, room, dim, dtype=like.dtype, device=like.device)
