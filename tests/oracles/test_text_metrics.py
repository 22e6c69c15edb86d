"""BLEU and ROUGE against sacreBLEU and rouge-score, on random and on adversarial text."""

import random
import sys
import unicodedata
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lora_core.evaluate.bleu import bleu, sentence_bleu
from lora_core.evaluate.bleu_tokens import TOKENIZERS
from lora_core.evaluate.rouge import rouge, rouge_row

pytestmark = pytest.mark.oracle

HARD = [
    "",
    " \t\n ",
    "The cat sat on the mat.",
    "the cat the cat on the mat the cat",
    "It's 1,000.5 dollars, or 1,000; 3.14... 2-3 (5-6) .5 5. ,5 5, 1.2.3",
    "well-known, state-of-\nthe-art <skipped> end-\nof-line\nnext line",
    "&quot;AT&amp;T&quot; &amp;lt; &lt;b&gt; & &amp;amp;",
    "!!!??? ,,,, .... a,,b a..b 1,,2 1..2 --- -- - 1--2 'tis ''quoted''",
    "Cafe\u0301 naïve e\u0301\u0302 Zalgo\u0336\u0337 İstanbul ẞ ﬁn K",
    "今日はいい天気ですね。明天，会议。 「引用」 ١٢٣٫٤ ٣.5 5.٣ ½ Ⅷ 三",
    "مرحبا بالعالم، كيف الحال؟ שלום עולם ۔",
    "👍🏽 👨‍👩‍👧 ❤️ € $5 50% ±3 x² a\u200bb a\ufeffb",
    "nul\x00byte \x1c\x1d\x1e\x1f\x85\xa0\u2028\u2029 line\r\nfeeds\rhere\x0b\x0c",
    "lone \ud800 surrogate \udfff s",
    "a" * 3000,
    "running runner runs ran easily flies dying generalizations aaas ssss",
    "The cat sat.\nOn the mat it sat.\n\nThe dog, too, sat.\n",
]
# characters that the rules tell apart, in every order
SCRAPS = st.text(alphabet="ab1٣ 2.,-'!&;<>\n\t—。«»€é\u0301今", max_size=12)
VOCABULARY = ["a", "b", "c", "the", "cat", "sat", "on", "mats,", "1,000.5", "-", "x."]
WORDS = st.lists(st.sampled_from(VOCABULARY), max_size=12)
# what one of the two tables of Unicode does not know is left out
KNOWN = st.characters().filter(lambda c: unicodedata.category(c) != "Cn")
TEXTS = st.one_of(WORDS.map(" ".join), SCRAPS, st.sampled_from(HARD), st.text(KNOWN, max_size=12))
ROWS = st.lists(
    st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=4
).map(lambda rows: tuple(map(list, zip(*rows, strict=True))))
LONG = " ".join(random.Random(0).choices(VOCABULARY, k=4000))


@pytest.fixture(scope="module")
def sacrebleu(oracle: Any) -> ModuleType:
    return oracle("sacrebleu")


@pytest.fixture(scope="module")
def scorer(oracle: Any) -> Any:
    return oracle("rouge_score.rouge_scorer").RougeScorer


def close(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) <= 1e-12 * max(1.0, abs(theirs))


def streams(references: list[list[str]]) -> list[list[str | None]]:
    """References in sacreBLEU's order: all first ones, all second ones; None where one lacks."""
    width = max(map(len, references))
    return [[r[i] if i < len(r) else None for r in references] for i in range(width)]


def theirs_cut(sacrebleu: ModuleType, name: str) -> Any:
    metric = sacrebleu.BLEU(tokenize=name)
    return lambda text: metric.tokenizer(text).split()


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_tokens_of_hard_text(sacrebleu: ModuleType, name: str) -> None:
    cut = theirs_cut(sacrebleu, name)
    for text in [*HARD, LONG, " ".join(HARD)]:
        assert TOKENIZERS[name](text) == cut(text), repr(text)


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@given(text=TEXTS)
def test_tokens_of_random_text(sacrebleu: ModuleType, name: str, text: str) -> None:
    assert TOKENIZERS[name](text) == theirs_cut(sacrebleu, name)(text)


@pytest.mark.parametrize("name", ["13a", "intl"])
def test_tokens_of_every_pair_of_marks_and_digits(sacrebleu: ModuleType, name: str) -> None:
    cut = theirs_cut(sacrebleu, name)
    marks = [chr(c) for c in range(33, 127)] + list("é—。€½\u0301\xa0 ")
    kinds = ["1", "a", ".", "-", "—", " "]
    text = [f"{a}{b}{c}" for a in kinds for b in marks for c in kinds]
    for one in text:
        assert TOKENIZERS[name](one) == cut(one), repr(one)


def test_every_character_that_both_tables_know(sacrebleu: ModuleType, full_run: bool) -> None:
    """A character of a category that changed between tables shows too: there are none."""
    cut = theirs_cut(sacrebleu, "intl")
    step = 1 if full_run else 97
    for code in range(0, sys.maxunicode + 1, step):
        if unicodedata.category(chr(code)) != "Cn":
            text = f"a{chr(code)}b 1{chr(code)}2"
            assert TOKENIZERS["intl"](text) == cut(text), hex(code)


def their_bleu(sacrebleu: ModuleType, **options: Any) -> Any:
    names = {"smooth": "smooth_method"}
    return sacrebleu.BLEU(force=True, **{names.get(k, k): v for k, v in options.items()})


OPTIONS = st.fixed_dictionaries(
    {
        "tokenize": st.sampled_from(sorted(TOKENIZERS)),
        "lowercase": st.booleans(),
        "effective_order": st.booleans(),
    }
)
SMOOTHING = st.one_of(
    st.fixed_dictionaries({"smooth": st.sampled_from(["exp", "none", "floor", "add-k"])}),
    st.fixed_dictionaries(
        {
            "smooth": st.sampled_from(["floor", "add-k"]),
            "smooth_value": st.sampled_from([1e-3, 0.3, 2, 5.5]),
        }
    ),
)


@given(rows=ROWS, options=OPTIONS, smoothing=SMOOTHING)
@example(rows=(HARD, [[text] for text in reversed(HARD)]), options={}, smoothing={})
@example(rows=(HARD, [[text, HARD[3]] for text in HARD]), options={}, smoothing={})
def test_corpus_bleu(
    sacrebleu: ModuleType, rows: Any, options: dict[str, Any], smoothing: dict[str, Any]
) -> None:
    predictions, references = rows
    metric = their_bleu(sacrebleu, **options, **smoothing)
    theirs = metric.corpus_score(predictions, streams(references))
    ours = bleu(predictions, references, **options, **smoothing)
    assert close(ours.estimate.value, theirs.score)
    assert all(map(close, ours.precisions, theirs.precisions))
    assert close(ours.brevity_penalty, theirs.bp)
    assert ours.lengths == (theirs.sys_len, theirs.ref_len)
    words = ours.signature.split("|")
    assert words[1:3] == ["bs:1000", "seed:0"]
    assert words[-1].startswith("version:lora-core-")
    assert [words[0], *words[3:-1]] == metric.get_signature().format().split("|")[:-1]


@given(text=TEXTS, references=st.lists(TEXTS, min_size=1, max_size=4), smoothing=SMOOTHING)
def test_sentence_bleu(
    sacrebleu: ModuleType, text: str, references: list[str], smoothing: dict[str, Any]
) -> None:
    metric = their_bleu(sacrebleu, effective_order=True, **smoothing)
    assert close(
        sentence_bleu(text, references, **smoothing), metric.sentence_score(text, references).score
    )


def test_bleu_of_long_text(sacrebleu: ModuleType) -> None:
    words = LONG.split()
    random.Random(1).shuffle(words)
    other = " ".join(words[:3000])
    theirs = their_bleu(sacrebleu).corpus_score([other, LONG], [[LONG, other]])
    assert close(bleu([other, LONG], [[LONG], [other]]).estimate.value, theirs.score)
    assert theirs.score > 1


def test_the_interval_is_that_of_sacrebleus_resamples(sacrebleu: ModuleType) -> None:
    """The same draws, scored by sacreBLEU, have the same percentiles."""
    generator = random.Random(2)
    rows = [" ".join(generator.choices(VOCABULARY[:6], k=9)) for _ in range(40)]
    predictions, references = rows[:20], rows[20:]
    ours = bleu(predictions, [[r] for r in references]).estimate
    draws = np.random.default_rng(0).integers(20, size=(1000, 20))
    metric = their_bleu(sacrebleu)
    stats = np.array(metric._extract_corpus_statistics(predictions, [references]))
    scores = [metric._compute_score_from_stats(stats[d].sum(axis=0).tolist()).score for d in draws]
    low, high = np.quantile(scores, [0.025, 0.975])
    assert close(ours.low, low)
    assert close(ours.high, high)
    assert ours.low < ours.value < ours.high


ROUGE_KINDS = ("rouge1", "rouge2", "rouge3", "rouge9", "rougeL", "rougeLsum")


def check_rouge(scorer: Any, text: str, references: list[str], stem: bool) -> None:
    theirs = scorer(list(ROUGE_KINDS), use_stemmer=stem).score_multi(references, text)
    ours = rouge_row(text, references, ROUGE_KINDS, stem)
    for kind in ROUGE_KINDS:
        assert ours[kind] == tuple(theirs[kind]), kind


SENTENCES = st.lists(st.one_of(WORDS.map(" ".join), SCRAPS), max_size=4).map("\n".join)


@given(text=TEXTS | SENTENCES, references=st.lists(TEXTS | SENTENCES, min_size=1, max_size=4))
def test_rouge_of_random_text(scorer: Any, text: str, references: list[str]) -> None:
    check_rouge(scorer, text, references, stem=False)
    check_rouge(scorer, text, references, stem=True)


@pytest.mark.parametrize("stem", [False, True])
def test_rouge_of_hard_text(scorer: Any, stem: bool) -> None:
    for text in HARD:
        check_rouge(scorer, text, [text], stem)
        check_rouge(scorer, text, HARD, stem)
    check_rouge(scorer, "\n".join(HARD), ["\n".join(reversed(HARD))], stem)


def test_stems(scorer: Any) -> None:
    """Every word of this module's texts, and endings that Porter's rules are about."""
    endings = ["ies", "ied", "sses", "ing", "eed", "ational", "tional", "izer", "fulness", "iviti"]
    endings += ["logi", "ement", "ion", "y"]
    words = [start + end for start in ("fl", "hopp", "relat", "a", "x1") for end in endings]
    text = " ".join([*words, *HARD])
    check_rouge(scorer, text, [text[::2], text], stem=True)


def test_rouge_of_a_corpus(scorer: Any) -> None:
    references = [[text, HARD[2]] for text in reversed(HARD)]
    theirs = [
        scorer(["rougeL"]).score_multi(row, text)["rougeL"]
        for text, row in zip(HARD, references, strict=True)
    ]
    ours = rouge(HARD, references, ["rougeL"])["rougeL"]
    for column, estimate in enumerate((ours.precision, ours.recall, ours.f1)):
        assert close(estimate.value, sum(row[column] for row in theirs) / len(HARD))
        assert estimate.count == len(HARD)
        assert estimate.low < estimate.value < estimate.high


def test_rouge_l_of_long_text(scorer: Any) -> None:
    generator = random.Random(3)
    one, two = (" ".join(f"w{generator.randrange(40)}" for _ in range(300)) for _ in "ab")
    check_rouge(scorer, one, [two], stem=False)
