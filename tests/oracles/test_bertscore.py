"""BERTScore against the bert-score package on the same folders, random and adversarial text."""

import json
import re
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.checkpoint import load_model
from lora_core.data import load_tokenizer
from lora_core.evaluate.bertscore import bert_score

pytestmark = pytest.mark.oracle

FAMILIES = ["bert", "roberta", "xlm-roberta"]
WORDS = ["a", "json", "encoder", "the", "linear", "layer", "naïve", "café", "日本", "😀", "bias,"]
TEXTS = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=30),
    st.lists(st.sampled_from(WORDS), min_size=30, max_size=60).map("  ".join),
    st.sampled_from(["", "  \n", "[SEP] json", "<pad> a </s> b", "[PAD]", "x" * 300, "\u200b"]),
)
ROWS = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def package(oracle: Callable[[str], ModuleType]) -> ModuleType:
    oracle("transformers")
    return oracle("bert_score")


@pytest.fixture(scope="module")
def theirs(
    package: ModuleType, encoder_folder: Callable[[str], Path]
) -> Callable[..., list[list[float]]]:
    """(P, R, F1) of each row by the package; models are read once."""
    read: dict[tuple[Path, int], Any] = {}

    def score(
        folder: Path, rows: list[tuple[str, list[str]]], layer: int, idf: bool = False
    ) -> list[list[float]]:
        if (folder, layer) not in read:
            made = package.BERTScorer(model_type=str(folder), num_layers=layer, device="cpu")
            peer, ends = made._tokenizer, ("cls_token_id", "sep_token_id")
            start, end = (getattr(peer, name) for name in ends)
            # of transformers 4, which the package asks for where a text is empty
            peer.build_inputs_with_special_tokens = lambda ids: [start, *ids, end]
            read[folder, layer] = made
        scorer = read[folder, layer]
        candidates, references = [c for c, _ in rows], [list(r) for _, r in rows]
        weights = None
        if idf:
            flat = [text for known in references for text in known]
            utils = __import__("bert_score.utils").utils
            weights = utils.get_idf_dict(flat, scorer._tokenizer, nthreads=0)
            scorer._idf, scorer._idf_dict = True, weights
        else:
            scorer._idf = False
            scorer._idf_dict = None
        # one pair at a time: their padding counts as a token of similarity 0
        found = []
        for candidate, known in zip(candidates, references, strict=True):
            pairs = [scorer.score([candidate], [text]) for text in known]
            found.append([max(float(pair[i]) for pair in pairs) for i in range(3)])
        return found

    return score


def close(ours: Any, theirs: list[list[float]]) -> None:
    # the reference's P and R are NaN where every weight is 0; see the docstring of bertscore.py
    wanted = [[0.0 if x != x else x for x in row] for row in theirs]
    assert len(ours.rows) == len(wanted)
    for mine, row in zip(ours.rows, wanted, strict=True):
        assert mine == pytest.approx(row, abs=5e-6)


@pytest.fixture(scope="module")
def opened(encoder_folder: Callable[[str], Path]) -> Callable[[str], tuple[Any, Any]]:
    """Our encoder and tokenizer of a family, read once."""

    @cache
    def read(family: str) -> tuple[Any, Any]:
        folder = encoder_folder(family)
        return load_model(folder), load_tokenizer(folder)

    return read


@given(rows=ROWS, layer=st.integers(0, 3), idf=st.booleans())
@pytest.mark.parametrize("family", FAMILIES)
def test_any_text(
    theirs: Callable[..., list[list[float]]],
    opened: Callable[[str], tuple[Any, Any]],
    encoder_folder: Callable[[str], Path],
    family: str,
    rows: list[tuple[str, list[str]]],
    layer: int,
    idf: bool,
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ rows have")
        ours = bert_score(
            *opened(family),
            [candidate for candidate, _ in rows],
            [known for _, known in rows],
            layer=layer,
            idf=idf,
            batch_size=2,
            prefix_space=False,
        )
    close(ours, theirs(encoder_folder(family), rows, layer, idf))
    for i, name in enumerate(("precision", "recall", "f1")):
        mean = sum(row[i] for row in ours.rows) / len(rows)
        assert getattr(ours, name).value == pytest.approx(mean, abs=1e-12)
        assert getattr(ours, name).count == len(rows)


def test_the_package_called_as_its_users_call_it(
    package: ModuleType, encoder_folder: Callable[[str], Path]
) -> None:
    """Several references and a baseline through its own options, all rows in one batch."""
    folder = encoder_folder("bert")
    candidates = ["the json encoder", "a linear layer with bias", "shape: input"]
    references = [["json encoder", "the linear layer"], ["a linear layer"], ["input", "shape"]]
    peers = package.score(candidates, references, model_type=str(folder), num_layers=3)
    wanted = torch.stack(peers, dim=1).tolist()
    model, tok = load_model(folder), load_tokenizer(folder)
    ours = bert_score(model, tok, candidates, references)
    assert ours.layer == 3
    close(ours, wanted)
    assert 0.2 < ours.f1.value < 0.95  # a figure that can be missed
    spread = bert_score(model, tok, candidates, references, baseline=(0.1, 0.2, 0.3))
    close(
        spread,
        [[(x - b) / (1 - b) for x, b in zip(r, (0.1, 0.2, 0.3), strict=True)] for r in wanted],
    )


def test_the_space_before_a_text_of_roberta(
    theirs: Callable[..., list[list[float]]], encoder_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """What add_prefix_space asks for: a folder whose tokenizer has it built in shows its scores."""
    folder = tmp_path / "spaced"
    shutil.copytree(encoder_folder("roberta"), folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_prefix_space": True}))
    file = folder / "tokenizer.json"
    file.write_text(
        re.sub('"add_prefix_space": ?false', '"add_prefix_space":true', file.read_text())
    )
    rows = [("json encoder", ["the json encoder"]), ("linear", ["encoder of the linear layer"])]
    wanted = theirs(folder, rows, 2)
    plain = encoder_folder("roberta")
    model, tok = load_model(plain), load_tokenizer(plain)
    texts = [c for c, _ in rows], [r for _, r in rows]
    close(bert_score(model, tok, *texts, layer=2), wanted)
    without = bert_score(model, tok, *texts, layer=2, prefix_space=False)
    close(without, theirs(plain, rows, 2))
    assert abs(without.f1.value - bert_score(model, tok, *texts, layer=2).f1.value) > 1e-3
