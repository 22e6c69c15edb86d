"""BLEU by its formula; tests/oracles holds it against sacreBLEU."""

import math
import unicodedata
from collections.abc import Callable
from importlib import metadata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.evaluate.bleu import bleu, bleu_counts, sentence_bleu, tokenize_13a
from lora_core.evaluate.bleu_tokens import TOKENIZERS, tokenize_char, tokenize_intl
from lora_core.evaluate.ngrams import ngrams

TEXTS = st.text(alphabet="ab1., -'\n今é\u0301\ud800", max_size=20)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's 1,000.5, or 3.14.", "It's 1,000.5 , or 3.14 ."),
        ("2-3 well-known -4", "2 - 3 well-known -4"),
        (".5 5. ,5", ". 5 5 . , 5"),
        ("a,,b 1,,2", "a , , b 1 , , 2"),
        ("٣.5 5.٣ 5.5", "٣ . 5 5 . ٣ 5.5"),  # digits are 0-9 alone
        ("(x)=[y]/{z}~`", "( x ) = [ y ] / { z } ~ `"),
        ("state-of-\nthe-art\nnow", "state-ofthe-art now"),
        ("&amp;lt;<skipped>&quot;", '< "'),
        ("今日は。“q”", "今日は。“q”"),
        ("", ""),
        (" \n\t ", ""),
    ],
)
def test_13a(text: str, tokens: str) -> None:
    assert tokenize_13a(text) == tokens.split()


def test_13a_takes_characters_apart_or_not() -> None:
    apart = {c for c in map(chr, range(33, 127)) if len(tokenize_13a(f"a{c}a")) == 3}
    assert apart == set('!"#$%&()*+,./:;<=>?@[\\]^_`{|}~')
    between_digits = {c for c in apart | {"-"} if len(tokenize_13a(f"1{c}1")) == 3}
    assert between_digits == apart - set(",.") | {"-"}


def test_intl_goes_by_unicode_categories() -> None:
    assert tokenize_intl("«今日は。» ۱٫۵ 5€ a.") == [
        "«",
        "今日は",
        "。",
        "»",
        "۱٫۵",
        "5",
        "€",
        "a",
        ".",
    ]
    assert tokenize_intl("in 1999.") == ["in", "1999."]  # as the script has it
    for code in range(0, 0x3000, 5):
        character = chr(code)
        kind = unicodedata.category(character)[0]
        if not character.isspace():
            assert len(tokenize_intl(f"a{character}a")) == (3 if kind in "PS" else 1), hex(code)
            assert len(tokenize_intl(f"1{character}1")) == (3 if kind == "S" else 1), hex(code)


def test_char_and_none() -> None:
    assert tokenize_char("e\u0301 今\u3000日\x1f\ud800") == ["e", "\u0301", "今", "日", "\ud800"]
    assert TOKENIZERS["none"](" a,b  c ") == ["a,b", "c"]


@given(text=TEXTS)
def test_no_character_is_lost(text: str) -> None:
    bare = "".join(text.split())
    for name in ("char", "intl", "none"):
        assert "".join(TOKENIZERS[name](text)) == bare
    assert "".join(tokenize_13a(text.replace("-\n", ""))) == "".join(
        text.replace("-\n", "").split()
    )


def slow_bleu(predictions: list[str], references: list[list[str]]) -> float:
    """Papineni et al. 2002, section 2.3, without smoothing; white space parts words."""
    matched, total, c, r = [0] * 4, [0] * 4, 0, 0
    for prediction, row in zip(predictions, references, strict=True):
        said = prediction.split()
        c += len(said)
        r += sorted((abs(len(x.split()) - len(said)), len(x.split())) for x in row)[0][1]
        for n in (1, 2, 3, 4):
            grams = [said[i : i + n] for i in range(len(said) - n + 1)]
            total[n - 1] += len(grams)
            for gram in {tuple(g) for g in grams}:
                most = 0
                for reference in row:
                    words = reference.split()
                    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
                    most = max(most, runs.count(gram))
                matched[n - 1] += min(most, grams.count(list(gram)))
    if not all(matched):
        return 0.0
    product = math.prod(m / t for m, t in zip(matched, total, strict=True))
    return 100 * (1.0 if c > r else math.exp(1 - r / c)) * product**0.25


ROW = st.lists(st.sampled_from("abc"), min_size=3, max_size=12).map(" ".join)


@given(rows=st.lists(st.tuples(ROW, st.lists(ROW, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_the_score_against_the_paper(rows: list[tuple[str, list[str]]]) -> None:
    predictions, references = [p for p, _ in rows], [r for _, r in rows]
    found = bleu(predictions, references, smooth="none")
    assert found.estimate.value == pytest.approx(slow_bleu(predictions, references), abs=1e-10)
    assert found.estimate.count == len(rows)


def test_the_interval_holds_the_score_and_repeats() -> None:
    predictions = [f"the cat number {i} sat on the mat" for i in range(30)]
    references = [[f"the cat number {i * 2} sat on mats"] for i in range(30)]
    first, again = (bleu(predictions, references).estimate for _ in range(2))
    assert first == again
    assert first.low < first.value < first.high
    assert first.method == "bootstrap"
    assert math.isnan(bleu(predictions[:1], references[:1]).estimate.low)


def test_equal_texts_score_100_and_empty_ones_nothing() -> None:
    text = "one two three four five"
    assert bleu([text], [[text]]).estimate.value == pytest.approx(100)
    assert bleu(["", ""], [["a"], ["b"]]).estimate.value == 0.0
    assert bleu(["", ""], [["a"], ["b"]]).brevity_penalty == 0.0
    assert bleu([""], [[""]]).brevity_penalty == 1.0
    assert sentence_bleu("", ["a"]) == sentence_bleu("a", [""]) == 0.0
    assert bleu(["", text], [["a"], [text]]).lengths == (5, 6)


def test_counts_of_a_row_and_white_space_at_its_end() -> None:
    counts = bleu_counts("the the cat", ["the cat", "the a cat sat sat"])
    assert counts == [3, 2, 2, 1, 0, 0, 3, 2, 1, 0]
    assert bleu_counts("The end-\n", ["the end"], lowercase=True)[2] == 1
    # the hyphen stays, since white space at the end goes before a hyphen and a line break do
    assert sentence_bleu("The end-\n", ["The end-"]) == pytest.approx(100)


def test_what_options_do() -> None:
    text, right = "The cat sat", "the cat sat"
    assert sentence_bleu(text, [right], lowercase=True) == pytest.approx(100)
    assert sentence_bleu(text, [right]) < 100
    assert sentence_bleu(right, [right], effective_order=False) == 0.0  # it has no 4-grams
    assert bleu([right], [[right]]).estimate.value == 0.0
    assert bleu([right], [[right]], effective_order=True).estimate.value == pytest.approx(100)
    # of 2, 1 and 0 words' n-grams none matches: 1/2, 1/4 of one n-gram each
    half = sentence_bleu("a x b", ["a y b"])
    assert half == pytest.approx(100 * (2 / 3 * (1 / 2 / 2) * (1 / 4)) ** (1 / 3))
    assert sentence_bleu("a x b", ["a y b"], smooth="none") == 0.0
    floor = sentence_bleu("a x b", ["a y b"], smooth="floor", smooth_value=0.3)
    assert floor == pytest.approx(100 * (2 / 3 * (0.3 / 2) * 0.3) ** (1 / 3))
    add = sentence_bleu("a x b", ["a y b"], smooth="add-k", smooth_value=2)
    assert add == pytest.approx(100 * (2 / 3 * (2 / 4) * (2 / 3) * (2 / 2)) ** (1 / 4))


def test_the_signature_and_the_text() -> None:
    version = metadata.version("lora-core")
    rows = ["a b c d e", "b c"], [["a b c d f"], ["b"]]
    assert bleu(*rows).signature == (
        "nrefs:1|bs:1000|seed:0|case:mixed|eff:no|tok:13a|smooth:exp|version:lora-core-" + version
    )
    found = bleu(["a", "b"], [["a"], ["a", "b"]], tokenize="char", smooth="add-k", lowercase=True)
    assert found.signature.startswith(
        "nrefs:var|bs:1000|seed:0|case:lc|eff:no|tok:char|smooth:add-k[1.00]|"
    )
    found = bleu(*rows, smooth="floor", smooth_value=0.25, effective_order=True)
    assert "|eff:yes|tok:13a|smooth:floor[0.25]|" in found.signature
    text = str(bleu(*rows))
    assert text.startswith("BLEU 61.48 [")
    assert text.endswith("(2 rows), 71.4/60.0/66.7/50.0, BP 1.000 (7 to 6 tokens)")


def test_the_version_where_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert bleu(["a"], [["a"]]).signature.endswith("|version:lora-core-not-installed")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bleu(["a"], [["a"]], tokenize="zh"), ValueError, "^tokenize must be one of 13a, "),
        (
            lambda: bleu(["a"], [["a"]], smooth="no"),
            ValueError,
            "^smooth must be one of exp, floor",
        ),
        (
            lambda: bleu(["a"], [["a"]], smooth_value=0.2),
            ValueError,
            "^only floor and add-k take a smooth_value; got 0.2 for 'exp'$",
        ),
        (
            lambda: sentence_bleu("a", ["a"], smooth="floor", smooth_value=0),
            ValueError,
            "^smooth_value must be above 0; got 0$",
        ),
        (lambda: bleu(["a", "b"], [["a"]]), ValueError, "^2 predictions and references for 1 rows"),
        (lambda: bleu(["a", "b"], [["a"], []]), ValueError, r"^references\[1\] is empty"),
        (lambda: bleu(["a"], ["a"]), TypeError, r"^references\[0\] must be a list of strings"),
        (lambda: bleu("a", [["a"]]), TypeError, "^predictions must be a list of strings"),
        (lambda: sentence_bleu("a", "a"), TypeError, "^references must be a list of strings"),
        (lambda: sentence_bleu("a", []), ValueError, "^references is empty"),
        (lambda: ngrams(["a"], 0), ValueError, "^n-grams need n ≥ 1; got 0$"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
