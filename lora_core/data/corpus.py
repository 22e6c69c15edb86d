"""Text to pretrain on: documents to train on, documents held out, and a tokenizer made from them.

What is held out follows from names, never from a random draw, so that adding a file moves no other
file to the other side. The tokenizer is byte-level BPE: every text can be written in it, and no
text needs a token for "unknown". Its words are cut with code in mind: a word takes one space before
it, line ends stick to the punctuation before them, an indentation is one piece, numbers go by three
digits.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.data.chat import builtin_template
from lora_core.data.tokenizer import Tokenizer

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

_PIECES = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_FILE_PIECE = 16384  # characters of a user's file that are held out or kept together


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out."""

    train: list[str]
    """texts to learn from"""
    held_out: list[str]
    """texts to be measured on"""
    held_out_names: list[str]
    """which documents those are"""
    sha256: str = field(init=False)
    """hash of all the texts, to tell corpora apart"""

    def __post_init__(self) -> None:
        for name, texts in (("train on", self.train), ("hold out", self.held_out)):
            if not texts:
                raise ValueError(
                    f"the text leaves nothing to {name}; give more text or another share held out"
                )
        digest = hashlib.sha256()
        for document in [*self.train, "\0", *self.held_out]:
            digest.update(document.encode() + b"\0")
        object.__setattr__(self, "sha256", digest.hexdigest())

    @property
    def held_out_bytes(self) -> int:
        """UTF-8 bytes of the held-out texts."""
        return sum(len(text.encode()) for text in self.held_out)


def is_held_out(name: str, percent: float = 5.0) -> bool:
    """Whether a document is kept from training: by a hash of its name, the same everywhere."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10000 < 100 * percent


def read_text_files(paths: Sequence[str | Path], percent: float = 5.0) -> Corpus:
    """Documents from plain text files.

    Args:
        paths: UTF-8 files. A file is one document, or several of about 16 KiB, cut at blank lines.
        percent: share of the documents to hold out, by a hash of file name and piece.

    Returns:
        The corpus. If the hash holds out nothing, the last document is held out.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not UTF-8, or all of it makes fewer than two documents.
    """
    named = [pair for path in paths for pair in _documents(Path(path))]
    held = [name for name, _ in named if is_held_out(name, percent)]
    if not held or len(held) == len(named):
        held = [named[-1][0]] if named else []
    train = [text for name, text in named if name not in held]
    return Corpus(train, [text for name, text in named if name in held], held)


def _documents(path: Path) -> list[tuple[str, str]]:
    """(name, text) of a file's pieces, each ending at a blank line or at the file's end."""
    if not path.is_file():
        raise FileNotFoundError(f"no text file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    pieces: list[tuple[str, str]] = []
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + _FILE_PIECE)
        end = len(text) if end < 0 else end + 2
        if text[start:end].strip():
            pieces.append((f"{path.name}#{len(pieces)}", text[start:end]))
        start = end
    return pieces


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Tokenizer:
    """Make a byte-level BPE tokenizer with ChatML's tokens and template.

    Args:
        texts: what to learn the merges from.
        vocab_size: tokens in all, the three special ones and the 256 bytes included.
        max_length: longest sequence of the model, in tokens; noted in the tokenizer's files.

    Returns:
        The tokenizer: `<|endoftext|>` is 0, ends documents and pads; `<|im_end|>` ends turns.

    Raises:
        ValueError: vocab_size has no room for bytes and special tokens, or texts are too few for
            so many merges.

    Ref:
        Sennrich et al. 2016, algorithm 1.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least} (bytes and marks); got {vocab_size}")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    made = backend.get_vocab_size()
    if made < vocab_size:
        raise ValueError(
            f"the text yields only {made} tokens, vocab_size asks for {vocab_size}; "
            f"take --vocab-size {made} or more text"
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    stop_ids = [SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(TURN_END)]
    return Tokenizer(backend, config, builtin_template("chatml"), stop_ids)


def overlapping_rows(ids: Sequence[int], length: int) -> list[dict[str, list[int]]]:
    """Rows that overlap by half and grade every token of a stream but the first exactly once.

    Args:
        ids: the token stream.
        length: tokens in a row, even or odd, at least 2.

    Returns:
        Rows `{"input_ids", "labels"}`; from the second row on, graded tokens have at least
        length - length // 2 tokens before them in their row.
    """
    stride = max(length // 2, 1)
    rows, start = [], 0
    graded = 1  # the first token has nothing before it
    while graded < len(ids):
        window = list(ids[start : start + length])
        seen = graded - start
        rows.append({"input_ids": window, "labels": [-100] * seen + window[seen:]})
        graded = start + len(window)
        start += stride
    return rows
