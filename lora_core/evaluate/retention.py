r"""Capability retention: what a model still makes of general text, so that forgetting is a number.

    forgetting = bits per byte after tuning − bits per byte before, over the same windows

A model tuned on one task gets worse at what it was not shown. Its loss on text that has nothing to
do with the task says by how much, without a benchmark, in seconds. Bits per byte, because tuning
may have grown the vocabulary; paired, because what makes a window hard makes it hard before and
after, so that the difference is known better than either figure.

The text that comes with the library is a fixed sample of the modules of Python's standard library
that the shipped base was not trained on (`is_held_out`): passages of whole lines, at equal
distances. For the base that is held-out text of the kind it learned. Another model has seen it in
pretraining; retention needs no unseen text, but one's own says more: give a file of what the model
should go on knowing. The standard library differs between Python versions, and the `source` says
which, with the sample's hash: figures compare where the hash is the same.

Each passage stands alone, after the tokenizer's start (BOS, else its end token, so that the first
token is judged too), cut into windows in which every token is judged once.
"""

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_core.data import IGNORED, Tokenizer
from lora_core.data.corpus import is_held_out
from lora_core.data.lines import read_rows
from lora_core.data.stdlib import read_modules
from lora_core.evaluate.encoding import check_decoder
from lora_core.evaluate.estimate import Estimate, ratio
from lora_core.evaluate.perplexity import Perplexity, perplexity

WINDOW = 256  # tokens; small enough for the shipped base
_PASSAGE = 1024  # characters, or a line more


@dataclass(frozen=True)
class GeneralText:
    """Passages to measure on, and where they come from."""

    texts: tuple[str, ...]
    """passages, none of them blank"""
    source: str
    """what they are, how many, and their hash, in a line"""

    @property
    def sha256(self) -> str:
        """Hash of the passages, in hexadecimal."""
        return _digest(self.texts)


def general_text(path: str | Path | None = None, *, limit_bytes: int = 65_536) -> GeneralText:
    """Text to measure retention on.

    Args:
        path: a UTF-8 text file, or `.jsonl` with a "text" a line; None: held-out modules of the
            running Python's standard library.
        limit_bytes: about how much text to take, in passages of about 1 KiB at equal distances;
            the same file and limit give the same passages.

    Returns:
        The passages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no UTF-8, a line without text, nothing but white space, or a limit below 1.
    """
    if limit_bytes < 1:
        raise ValueError(f"limit_bytes must be 1 or more; got {limit_bytes}")
    if path is None:
        modules = read_modules(wanted=is_held_out)
        documents = [module.text for module in modules]
        name = f"{len(modules)} held-out modules of Python {sys.version_info.major}."
        name += f"{sys.version_info.minor}'s standard library"
    else:
        documents, name = _documents(Path(path)), str(path)
    everything = [passage for text in documents for passage in _passages(text)]
    if not everything:
        raise ValueError(f"{name} holds no text to measure on")
    texts = _spread(everything, limit_bytes)
    size = sum(len(text.encode()) for text in texts)
    source = f"{len(texts)} passages ({size} bytes) of {name}, sha256 {_digest(texts)[:12]}"
    return GeneralText(texts, source)


def general_loss(
    model: nn.Module,
    tok: Tokenizer,
    text: GeneralText,
    *,
    window: int | None = None,
    limit_tokens: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """What a model makes of general text, window by window.

    Args:
        model: a decoder, its adapters as they are: measure inside `disable_adapters(model)` for
            the base.
        tok: its tokenizer.
        text: from `general_text`.
        window: tokens in a window; None: 256, or the model's positions where they are fewer.
        limit_tokens: stop at the first window that brings the judged tokens to so many; None: all
            of the text, so that bits per byte compare across tokenizers.
        batch_size: windows in one forward pass.

    Returns:
        The measures, `bits_per_byte` among them, and each window's sums.

    Raises:
        ValueError: an encoder, an option out of range, or a NaN.
    """
    check_decoder(model, "the loss on general text")
    if window is not None and window < 2:
        raise ValueError(f"window must be 2 or more tokens; got {window}")
    if limit_tokens is not None and limit_tokens < 1:
        raise ValueError(f"limit_tokens must be 1 or more; got {limit_tokens}")
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", WINDOW)
    length = min(WINDOW, positions) if window is None else window
    rows, judged = [], 0
    for passage in text.texts:
        for row in windows(tok, passage, length):
            if limit_tokens is None or judged < limit_tokens:
                rows.append(row)
                judged += sum(label != IGNORED for label in row["labels"])
    return perplexity(model, rows, batch_size=batch_size)


def forgetting(before: Perplexity, after: Perplexity) -> Estimate:
    """How much worse a model has become on the same windows.

    Args:
        before: `general_loss` of the base, or before tuning.
        after: of the tuned model, with the same tokenizer, text and window.

    Returns:
        The difference in bits per byte, above 0 where the model has forgotten, with an interval
        from windows drawn in pairs.

    Raises:
        ValueError: they are not over the same windows, or do not say their windows' bytes.
    """
    if before.row_bytes is None or after.row_bytes is None:
        raise ValueError("forgetting needs the bytes of each window: measure with general_loss")
    if (before.row_bytes, before.row_tokens) != (after.row_bytes, after.row_tokens):
        raise ValueError(
            f"forgetting compares the same windows; got {len(before.row_bytes)} windows of "
            f"{before.tokens} tokens before and {len(after.row_bytes)} of {after.tokens} after: "
            "measure both with one tokenizer, text and window"
        )
    pairs = zip(after.row_nll, before.row_nll, strict=True)
    return ratio([(a - b) / math.log(2) for a, b in pairs], before.row_bytes, unit="bytes")


def windows(tok: Tokenizer, text: str, length: int) -> Iterator[dict[str, Any]]:
    """Rows that judge each token of a text once.

    Args:
        tok: the tokenizer.
        text: a passage.
        length: tokens in a row, at least 2.

    Yields:
        {"input_ids", "labels", "graded_bytes"}: the first row begins with the start of a text, each
        further one with the last token of the row before. The bytes of all rows together are the
        text's, but for the first token's where the tokenizer names nothing to begin with.
    """
    ids, offsets = tok.encode_with_offsets(text)
    starts = [start for start, _ in offsets]
    before = list(tok.prefix_ids) or ([] if tok.eos_id is None else [tok.eos_id])
    if not before:
        before, ids, starts = ids[:1], ids[1:], starts[1:]
    elif starts:
        starts[0] = 0  # white space that no token covers
    done = 0
    while done < len(ids):
        taken = ids[done : done + length - len(before)]
        stop = done + len(taken)
        end = starts[stop] if stop < len(ids) else len(text)
        yield {
            "input_ids": before + taken,
            "labels": [IGNORED] * len(before) + taken,
            "graded_bytes": len(text[starts[done] : end].encode()),
        }
        before, done = taken[-1:], stop


def _documents(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        found = []
        for where, row in read_rows(path):
            if not isinstance(row.get("text"), str):
                raise ValueError(f"{where}: each line needs a 'text'; keys are {sorted(row)}")
            found.append(row["text"])
        return found
    if not path.is_file():
        raise FileNotFoundError(f"no text file {str(path)!r}")
    try:
        return [path.read_text(encoding="utf-8-sig")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _passages(text: str) -> Iterator[str]:
    """Pieces of whole lines, at least `_PASSAGE` characters each but the last; none is blank."""
    lines = (
        line[i : i + _PASSAGE]
        for line in text.splitlines(keepends=True)
        for i in range(0, len(line), _PASSAGE)  # a line without an end is cut
    )
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= _PASSAGE:
            yield from _unless_blank(held)
            held, size = [], 0
    yield from _unless_blank(held)


def _unless_blank(lines: list[str]) -> Iterator[str]:
    passage = "".join(lines)
    if passage.strip():
        yield passage


def _spread(passages: list[str], limit_bytes: int) -> tuple[str, ...]:
    """Passages at equal distances, about so many bytes in all, at least one."""
    total = sum(len(passage.encode()) for passage in passages)
    count = min(len(passages), max(1, round(len(passages) * limit_bytes / total)))
    return tuple(passages[i * len(passages) // count] for i in range(count))


def _digest(texts: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
