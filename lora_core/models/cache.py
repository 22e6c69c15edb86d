"""Keys and values of the tokens that were already seen, so that generation computes each once.

One buffer a layer, doubled when full, so a text of n tokens costs O(n) copying instead of the
O(n^2) of concatenating at each step. The cache knows nothing of padding: the attention mask that
goes with it covers past and new tokens.
"""

import torch
from torch import Tensor


class KVCache:
    """Growing key and value buffers, one pair a layer.

    Args:
        capacity: tokens to make room for at first; more are made when needed.
    """

    def __init__(self, capacity: int = 256) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1; got {capacity}")
        self._capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: dict[int, int] = {}

    @property
    def length(self) -> int:
        """Tokens held (by the first layer; between forwards by all of them)."""
        return self._lengths.get(0, 0)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append to a layer and return all it holds.

        Args:
            layer: index of the layer.
            key: (B, H, T, D), new keys, already rotated.
            value: (B, H, T, D), new values.

        Returns:
            Keys and values (B, H, past + T, D), views of the buffers.
        """
        past = self._lengths.get(layer, 0)
        total = past + key.shape[2]
        if layer not in self._layers:
            room = max(total, self._capacity)
            self._layers[layer] = (_buffer(key, room), _buffer(value, room))
        elif total > self._layers[layer][0].shape[2]:
            grown = [_grow(old, past, 2 * total) for old in self._layers[layer]]
            self._layers[layer] = (grown[0], grown[1])
        keys, values = self._layers[layer]
        keys[:, :, past:total] = key
        values[:, :, past:total] = value
        self._lengths[layer] = total
        return keys[:, :, :total], values[:, :, :total]


def _buffer(like: Tensor, room: int) -> Tensor:
    batch, heads, _, dim = like.shape
    return torch.empty(batch, heads, room, dim, dtype=like.dtype, device=like.device)


def _grow(old: Tensor, used: int, room: int) -> Tensor:
    new = _buffer(old, room)
    new[:, :, :used] = old[:, :, :used]
    return new
