r"""Words as BLEU counts them: the tokenizers of mteval, which published scores go by.

BLEU between two systems compares only where both were cut into the same tokens, so these follow
the NIST scripts to the letter, the oddities with them:

    13a    mteval-v13a, what WMT reports: ASCII punctuation apart from words, but 1,000.5 kept whole
    intl   mteval-v14: the same idea by Unicode categories, so « 。 and ۔ are apart too
    char   every character but white space, for text without spaces between words
    none   what white space separates, for text that is tokenized already

A rule consumes the characters that it matched, so that in "a,,b" only every second comma is seen by
it and the next rule sees the rest. That is why the rules are kept apart here, and in their order.

intl goes by the Unicode tables of the running Python (3.11: Unicode 14). A character newer than
those is of no category and stays within its word; sacreBLEU takes the package `regex`'s tables.
"""

import re
import string
import sys
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import groupby

Tokenizer = Callable[[str], list[str]]
_Rules = tuple[tuple[re.Pattern[str], str], ...]

_APART = re.escape("".join(sorted(set(string.punctuation) - set("'-.,"))))
_13A: _Rules = (
    (re.compile(f"([{_APART}])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # unless a digit stands before it
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),  # unless a digit stands after it
    (re.compile(r"([0-9])-"), r"\1 - "),
)
# &amp; before the other two, so that &amp;lt; becomes <
_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def tokenize_13a(text: str) -> list[str]:
    """Cut a text as mteval-v13a does, the tokenizer of WMT.

    Args:
        text: a segment; a line break within it counts as a space, one after a hyphen joins a word.

    Returns:
        Its tokens.

    Ref:
        NIST 2009, mteval-v13a.pl; Post 2018, "A Call for Clarity in Reporting BLEU Scores",
        arXiv:1804.08771.
    """
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    return _cut(f" {text} ", _13A)


def tokenize_intl(text: str) -> list[str]:
    """Cut a text as mteval-v14 does with international tokenization.

    Args:
        text: a segment.

    Returns:
        Its tokens. A full stop that ends the text stays with a number before it, as in the script.
    """
    return _cut(text, _intl_rules())


def tokenize_char(text: str) -> list[str]:
    """Cut a text into its characters, white space left out.

    Args:
        text: a segment.

    Returns:
        Its code points; a letter and a combining mark after it are two.
    """
    return list("".join(text.split()))


TOKENIZERS: dict[str, Tokenizer] = {
    "13a": tokenize_13a,
    "char": tokenize_char,
    "intl": tokenize_intl,
    "none": str.split,
}


def tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name.

    Args:
        name: a key of `TOKENIZERS`.

    Returns:
        A function from a text to its tokens.

    Raises:
        ValueError: no such tokenizer.
    """
    if name not in TOKENIZERS:
        raise ValueError(f"tokenize must be one of {', '.join(TOKENIZERS)}; got {name!r}")
    return TOKENIZERS[name]


def _cut(text: str, rules: _Rules) -> list[str]:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text.split()


@cache
def _intl_rules() -> _Rules:
    marks, numbers, symbols = _classes("PNS")
    return (
        (re.compile(f"([^{numbers}])([{marks}])"), r"\1 \2 "),
        (re.compile(f"([{marks}])([^{numbers}])"), r" \1 \2"),
        (re.compile(f"([{symbols}])"), r" \1 "),
    )


def _classes(kinds: str) -> list[str]:
    """For each kind the characters whose category begins so, as ranges for a character class."""
    found, start = dict.fromkeys(kinds, ""), 0
    categories = map(unicodedata.category, map(chr, range(sys.maxunicode + 1)))
    for kind, run in groupby(category[0] for category in categories):
        end = start + sum(1 for _ in run)
        if kind in found:
            found[kind] += rf"\U{start:08x}-\U{end - 1:08x}"
        start = end
    return list(found.values())
