r"""Rows that say the same again: answers alike by ROUGE-L, to prompts alike by ROUGE-L.

    similarity(a, b) = F1 of the longest common subsequence = 2 L / (m + n), m and n words

A row is a near duplicate of one kept before if both their prompts and their answers are at least as
alike as the threshold. Self-Instruct compares one text with all kept; of pairs of a prompt and an
answer that would drop every "yes" after the first, and a question asked of two texts. Answers to
one prompt, of which a sampler draws many, are compared by themselves, as rejection sampling does.

Words are ROUGE's (runs of letters and digits in lower case) and further: letters of any script,
each Chinese, Japanese or Korean sign by itself, and each other sign, so that `x + 1` and `x - 1`
differ and text without Latin letters is not all alike. On ASCII words the figure is rouge.py's.

Every row is compared with every kept one, and few get as far as the subsequence: words are counted
in 128 buckets, and a subsequence has no more words than the buckets have in common, which one pass
of integer minima tells for all kept rows at once. A bucket that two words share only weakens the
bound. The trade-off against an index of hashes: nothing is approximate, and the time grows with
the square of the rows.

Ref: Wang et al. 2022, arXiv:2212.10560, section 2.2 (0.7, against everything kept so far).
"""

import re
import zlib
from functools import lru_cache

import torch

from lora_core.evaluate.lcs import lcs_length

BUCKETS = 128
_SIGNS = "぀-ヿ㐀-鿿가-힯"
_WORD = re.compile(rf"[{_SIGNS}]|[^\W_{_SIGNS}]+|[^\w\s]|_")


def words_of(text: str) -> list[str]:
    """A text's words in lower case; see the module."""
    return _WORD.findall(text.lower())


def similarity(a: str, b: str) -> float:
    """F1 of the longest common subsequence of two texts' words, in [0, 1]; 1 of two empty ones."""
    return _similarity(words_of(a), words_of(b))


def _similarity(a: list[str], b: list[str]) -> float:
    total = len(a) + len(b)
    return 2 * lcs_length(a, b) / total if total else 1.0


class NearDuplicates:
    """The rows kept so far.

    Args:
        threshold: a row repeats another if prompts and answers are both this much alike or more,
            in (0, 1]; 0: exact duplicates alone.

    Raises:
        ValueError: a threshold out of range.
    """

    def __init__(self, threshold: float = 0.7) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(
                f"dedupe must be in (0, 1], or 0 for exact duplicates alone; got {threshold}"
            )
        self.threshold = threshold
        self._exact: set[tuple[str, str]] = set()
        self._answers: list[list[str]] = []
        self._counts = torch.zeros(64, BUCKETS, dtype=torch.int32)  # of the answers, room to grow
        self._alike = lru_cache(maxsize=1 << 16)(similarity)
        self._prompts: list[str] = []

    def __len__(self) -> int:
        return len(self._answers)

    def found(self, prompt: str, answer: str) -> str | None:
        """What a row repeats: "duplicate", "near duplicate", or None where it is new."""
        if (prompt, answer) in self._exact:
            return "duplicate"
        if not self.threshold:
            return None
        words = words_of(answer)
        for number in self._candidates(words):
            if _similarity(words, self._answers[number]) < self.threshold:
                continue
            other = self._prompts[number]
            if prompt == other or self._alike(prompt, other) >= self.threshold:
                return "near duplicate"
        return None

    def keep(self, prompt: str, answer: str) -> None:
        """Add a row, whatever it repeats."""
        words, count = words_of(answer), len(self._answers)
        if count == len(self._counts):
            self._counts = torch.cat([self._counts, torch.zeros_like(self._counts)])
        self._counts[count] = _counted(words)
        self._answers.append(words)
        self._prompts.append(prompt)
        self._exact.add((prompt, answer))

    def _candidates(self, words: list[str]) -> list[int]:
        """Kept rows whose answers may be as alike as the threshold, in their order."""
        kept = self._counts[: len(self._answers)]
        shared = torch.minimum(kept, _counted(words)).sum(dim=1)  # no subsequence is longer
        total = kept.sum(dim=1) + len(words)
        # `>=`: the float of the bound may round below that of the similarity
        close = 2 * shared.double() >= self.threshold * total.double() - 1e-9
        return [int(i) for i in close.nonzero().flatten()]


def _counted(words: list[str]) -> torch.Tensor:
    """(BUCKETS,) int32: how many words fall into each bucket, the same in every process."""
    places = torch.tensor([zlib.crc32(word.encode()) % BUCKETS for word in words], dtype=torch.long)
    return torch.bincount(places, minlength=BUCKETS).to(torch.int32)
