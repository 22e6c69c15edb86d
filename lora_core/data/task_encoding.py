"""From labelled examples to rows of token ids; the design note is in task_rows.py.

A text that spells a control token ("[SEP]", "</s>") is text: it is encoded as its characters, so
that it can neither end a row nor forge the boundary between question and context.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

from lora_core.data.task_frame import Frame
from lora_core.data.task_labels import names_of, number_of, value_of
from lora_core.data.task_records import Example, QuestionExample, TextExample, WordsExample
from lora_core.data.tokenizer import Tokenizer

IGNORED = -100  # the label of a token that is not graded
Offsets = list[tuple[int, int]]


class TaskRow(TypedDict, total=False):
    """One row: `input_ids`, what is graded, and the way back."""

    input_ids: list[int]
    token_type_ids: list[int]
    """segments, where the tokenizer has them"""
    example: int
    """number of the example it was made of"""
    label: Any
    """of a sequence: a number, a list of 0.0 and 1.0, or a float"""
    labels: list[int]
    """of tokens: by token, -100 where not graded"""
    start: int
    """of a span: the answer's first token"""
    end: int
    """of a span: its last token"""
    nowhere: int
    """of a span: where it points without an answer: the first token, a decoder's last"""
    words: list[int]
    """of tokens: by token, the number of the word whose first piece it is, or -1"""
    offsets: Offsets
    """of a span: by token, its characters in the context; (-1, -1) outside"""


class TaskEncoder:
    """Makes rows, and counts what was cut.

    Args:
        tok: from `load_tokenizer`.
        max_length: longest row, in tokens.
        labels: names by number.
        problem: of sequences.
        causal: whether rows are for a decoder; None: as the tokenizer looks.
        overlap: tokens that neighbouring windows share.

    Raises:
        ValueError: a max_length in which the tokenizer's own tokens leave no room.
    """

    def __init__(
        self,
        tok: Tokenizer,
        max_length: int,
        labels: Sequence[str],
        problem: str,
        causal: bool | None,
        overlap: int,
    ) -> None:
        self.tok = tok
        self.frame = Frame.of(tok, causal)
        self.max_length = max_length
        self.labels = list(labels)
        self.problem = problem
        self.overlap = overlap
        self.cut = 0
        self.lost_words = 0
        self.windows = 0
        self.cut_questions = 0
        least = self.frame.extra(2) + 2
        if max_length < least:
            raise ValueError(
                f"max_length must be at least {least}: this tokenizer puts "
                f"{self.frame.extra(2)} tokens around two texts; got {max_length}"
            )
        if overlap < 0:
            raise ValueError(f"overlap must not be negative; got {overlap}")

    def rows(self, example: Example, number: int) -> list[TaskRow]:
        """The rows of an example: one, or several of a long one."""
        if isinstance(example, TextExample):
            return [self._text(example, number)]
        if isinstance(example, WordsExample):
            return self._words(example, number)
        return self._question(example, number)

    def notes(self) -> list[str]:
        """What was cut, in words."""
        told = (
            (self.cut, "texts were cut to max_length"),
            (self.windows, "further windows for long contexts or sentences"),
            (self.cut_questions, "questions were cut to half of max_length"),
            (self.lost_words, "words have no token of their own and are not graded"),
        )
        return [f"{count} {words}" for count, words in told if count]

    # --- sequences ---

    def _text(self, example: TextExample, number: int) -> TaskRow:
        texts = [self._encoded(example.text)[0]]
        if example.text_pair is not None:
            texts.append(self._encoded(example.text_pair)[0])
        room = self.max_length - self.frame.extra(len(texts))
        self.cut += sum(map(len, texts)) > room
        _shorten(texts, room)
        row = self._row(number, *texts)
        if not row["input_ids"]:
            raise ValueError(f"{example.where}: the text has no tokens")
        if example.label is not None:
            row["label"] = self._label(example)
        return row

    def _label(self, example: TextExample) -> Any:
        if self.problem == "regression":
            return value_of(example)
        numbers = [
            number_of(name, self.labels, example.where) for name in names_of(example, self.problem)
        ]
        if self.problem == "multi_label_classification":
            return [float(i in numbers) for i in range(len(self.labels))]
        if isinstance(example.label, tuple):
            raise ValueError(
                f"{example.where}: label must be one label, as in training; got "
                f"{list(example.label)}"
            )
        return numbers[0]

    # --- tokens ---

    def _words(self, example: WordsExample, number: int) -> list[TaskRow]:
        text = " ".join(example.words)
        ids, offsets = self._encoded(text)
        first = _first_pieces(example.words, offsets)
        self.lost_words += len(example.words) - sum(word >= 0 for word in first)
        rows = []
        for begin, end in self._pieces(first):
            row = self._row(number, ids[begin:end])
            shift, tail = self.frame.start(), len(row["input_ids"])
            row["words"] = [-1] * shift + first[begin:end]
            row["words"] += [-1] * (tail - len(row["words"]))
            if example.tags is not None:
                tags = [number_of(tag, self.labels, example.where) for tag in example.tags]
                row["labels"] = [tags[word] if word >= 0 else IGNORED for word in row["words"]]
            rows.append(row)
        self.windows += len(rows) - 1
        return rows

    def _pieces(self, first: Sequence[int]) -> list[tuple[int, int]]:
        """Runs of tokens that fit into a row, begun at the first piece of a word if one is near."""
        room, runs, begin = self.max_length - self.frame.extra(1), [], 0
        while len(first) - begin > room:
            end = begin + room
            starts = [i for i in range(begin + 1, end + 1) if first[i] >= 0]
            end = starts[-1] if starts else end
            runs.append((begin, end))
            begin = end
        return [*runs, (begin, len(first))]

    # --- spans ---

    def _question(self, example: QuestionExample, number: int) -> list[TaskRow]:
        question = self._encoded(example.question)[0]
        room = self.max_length - self.frame.extra(2)
        if len(question) > room // 2:
            self.cut_questions += 1
            question = question[: room // 2]
        ids, offsets = self._encoded(example.context)
        if not ids:
            raise ValueError(f"{example.where}: the context has no tokens")
        answer = None
        if example.answers is not None:
            answer = _token_span(offsets, example.answers[0]) if example.answers else (-1, -1)
        rows = []
        for begin, end in self._windows(len(ids), room - len(question)):
            row = self._row(number, question, ids[begin:end])
            shift, size = self.frame.start(len(question)), len(row["input_ids"])
            row["offsets"] = [(-1, -1)] * shift + offsets[begin:end]
            row["offsets"] += [(-1, -1)] * (size - len(row["offsets"]))
            row["nowhere"] = nowhere = size - 1 if self.frame.causal else 0
            if answer is not None:
                whole = begin <= answer[0] and answer[1] < end
                row["start"] = answer[0] - begin + shift if whole else nowhere
                row["end"] = answer[1] - begin + shift if whole else nowhere
            rows.append(row)
        self.windows += len(rows) - 1
        return rows

    def _windows(self, tokens: int, room: int) -> list[tuple[int, int]]:
        """(first, end) of each window of a context of so many tokens."""
        step = max(1, room - min(self.overlap, room // 2))
        windows = [(0, min(room, tokens))]
        while windows[-1][1] < tokens:
            begin = windows[-1][0] + step
            windows.append((begin, min(begin + room, tokens)))
        return windows

    def _encoded(self, text: str) -> tuple[list[int], Offsets]:
        """Ids and places of plain text, control tokens' names included."""
        backend = self.tok.backend
        before = backend.encode_special_tokens
        backend.encode_special_tokens = True
        try:
            return self.tok.encode_with_offsets(text)
        finally:
            backend.encode_special_tokens = before

    def _row(self, number: int, *texts: Sequence[int]) -> TaskRow:
        row: TaskRow = {"input_ids": self.frame.ids(*texts), "example": number}
        types = self.frame.types(*texts)
        if types is not None or (self.frame.pair_types is not None):
            row["token_type_ids"] = types or [0] * len(row["input_ids"])
        return row


def _shorten(texts: list[list[int]], room: int) -> None:
    """Cut ends, the longer text's first, until all fit."""
    while sum(map(len, texts)) > room:
        longest = max(texts, key=len)
        others = [len(text) for text in texts if text is not longest]
        excess = sum(map(len, texts)) - room
        spare = len(longest) - max(others, default=0)
        del longest[len(longest) - min(excess, max(1, spare)) :]


def _first_pieces(words: Sequence[str], offsets: Offsets) -> list[int]:
    """By token: the word of which it is the first piece, or -1; words are joined by one space."""
    first, place, spans = [-1] * len(offsets), 0, []
    for word in words:
        spans.append((place, place + len(word)))
        place += len(word) + 1
    token = 0
    for number, (start, end) in enumerate(spans):
        while token < len(offsets) and offsets[token][1] <= start:
            token += 1
        if token < len(offsets) and offsets[token][0] < end:
            first[token] = number
            token += 1
    return first


def _token_span(offsets: Offsets, answer: tuple[str, int]) -> tuple[int, int]:
    """First and last token of an answer, those that only touch its spaces left out."""
    text, start = answer
    begin = start + len(text) - len(text.lstrip())
    end = start + len(text.rstrip())
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin and b > a]
    return (inside[0], inside[-1]) if inside else (-1, -1)
