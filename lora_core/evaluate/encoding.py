"""Texts through an encoder: ids as BERTScore's and sentence-transformers' tokenizers give them.

A text is stripped of white space at its ends, put between the tokenizer's special tokens and, where
it is longer than the encoder has positions, cut at its end with the last special token kept. What
is cut is counted. Rows are padded on the right; nothing is told from the padding's id but RoBERTa's
positions, which go by it (models/encoder_layers.py), so padding bears the encoder's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_core.data import Tokenizer, check_vocabulary
from lora_core.evaluate.perplexity import modes_kept
from lora_core.models import Encoder, EncoderModel


def check_decoder(model: nn.Module, what: str) -> None:
    """Refuse an encoder where text is graded word by word.

    Raises:
        ValueError: the model is one.
    """
    if isinstance(model, EncoderModel):
        raise ValueError(
            f"{what} needs a decoder, which continues text; got an encoder ({type(model).__name__})"
        )


@dataclass
class TextEncoder:
    """An encoder and its tokenizer, as one function of texts.

    Args:
        encoder: with any head or none; adapters count.
        tok: its tokenizer.
        prefix_space: put a space before each text, for byte-level tokenizers that would cut the
            first word otherwise than the others.

    Raises:
        ValueError: no encoder, or one that is too small for its tokenizer's ids or special tokens.
    """

    encoder: nn.Module
    tok: Tokenizer
    prefix_space: bool = False
    truncated: int = 0
    """texts cut so far"""
    trunk: Encoder = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.encoder, EncoderModel):
            raise ValueError(
                "text is embedded by an encoder (BERT, RoBERTa, XLM-R, CamemBERT); got "
                f"{type(self.encoder).__name__}: load such a folder with load_model"
            )
        self.trunk = self.encoder.trunk
        check_vocabulary(self.tok, self.trunk.config.vocab_size)
        bare, full = self.tok.encode("x"), self.tok.encode("x", add_special_tokens=True)
        self._before = list(self.tok.prefix_ids)
        self._after = full[len(self._before) + len(bare) :]
        if self.room < 1:
            raise ValueError("the special tokens alone fill the encoder's positions: no text fits")

    @property
    def layers(self) -> int:
        """How many layers the encoder has."""
        return self.trunk.config.num_hidden_layers

    @property
    def special_ids(self) -> set[int]:
        """What the tokenizer puts around a text."""
        return {*self._before, *self._after}

    @property
    def room(self) -> int:
        """Tokens of text that fit, special ones aside."""
        config, said = self.trunk.config, self.tok.config.get("model_max_length")
        positions = config.max_position_embeddings - config.first_position
        longest = min(positions, said) if isinstance(said, int) else positions
        return longest - len(self._before) - len(self._after)

    def content(self, text: str) -> list[int]:
        """Ids of a text alone, none for an empty one; too long ones are cut and counted."""
        text = text.strip()
        if not text:
            return []
        ids = self.tok.encode(f" {text}" if self.prefix_space else text)
        self.truncated += len(ids) > self.room
        return ids[: self.room]

    def check(self, layer: int, batch_size: int) -> None:
        """Refuse options out of range.

        Raises:
            ValueError: `batch_size` below 1, or a layer that the encoder has not.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more; got {batch_size}")
        if not 0 <= layer <= self.layers:
            raise ValueError(
                f"layer must be 0 (the embeddings) … {self.layers} for this encoder; got {layer}"
            )

    def around(self, content: Sequence[int]) -> list[int]:
        """A text's ids with the special ones around it."""
        return [*self._before, *content, *self._after]

    @torch.no_grad()
    def states(self, contents: Sequence[Sequence[int]], layer: int) -> tuple[Tensor, Tensor]:
        """Hidden states of some texts, in one forward pass without dropout.

        Args:
            contents: what `content` gave for each.
            layer: 0: the embeddings; then each layer's output.

        Returns:
            Hidden states (B, T, C) in float32 or wider, and a mask (B, T), True for real tokens,
            the special ones included.

        Raises:
            ValueError: an empty text where the tokenizer adds no special token, or a NaN.
        """
        ids, mask = self._padded(contents)
        with modes_kept(self.encoder):
            self.encoder.eval()
            out = self.trunk(ids, mask.long(), output_hidden_states=True)
        assert out.hidden_states is not None
        states: Tensor = out.hidden_states[layer]  # (B, T, C)
        if bool(states.isnan().logical_and(mask[..., None]).any()):
            raise ValueError(
                f"the encoder's layer {layer} gives NaN: its weights or its adapter hold NaN, or "
                "the dtype is too narrow"
            )
        return states.to(torch.promote_types(states.dtype, torch.float32)), mask

    def _padded(self, contents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        rows = [self.around(ids) for ids in contents]
        if not all(rows):
            raise ValueError("an empty text has no token to embed: this tokenizer adds none")
        width, device = max(map(len, rows)), self.trunk.device
        pad = self.trunk.config.pad_token_id or 0
        full = [[*row, *[pad] * (width - len(row))] for row in rows]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(width, device=device) < lengths[:, None]  # (B, T)
        return torch.tensor(full, device=device), mask


def by_length(contents: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Numbers of the texts, those of like length together, `batch_size` at a time."""
    order = sorted(range(len(contents)), key=lambda i: -len(contents[i]))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def shown(rows: Sequence[int]) -> str:
    """Numbers of rows for a message, the first eight of many."""
    return f"rows {', '.join(map(str, rows[:8]))}{' …' if len(rows) > 8 else ''}"
