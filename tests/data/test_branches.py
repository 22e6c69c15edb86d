"""Prompts and their completions laid out as rows, shared and apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data.branches import Branched, branch_batch

ids = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@st.composite
def rows(draw: st.DrawFn) -> Branched:
    prompt = draw(ids)
    completions = tuple(draw(st.lists(ids, min_size=1, max_size=3)))
    flags = tuple(
        tuple(draw(st.lists(st.booleans(), min_size=len(c), max_size=len(c)))) for c in completions
    )
    return Branched(prompt, completions, draw(st.sampled_from([None, flags])))


def test_the_layout() -> None:
    batch = branch_batch([Branched((1, 2, 3), ((4, 5), (6,))), Branched((7,), ((8,),))], pad_id=99)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 3, 6], [7, 8, 99, 99, 99, 99, 99]]
    assert batch["branch_ids"].tolist() == [[0, 0, 1, 1, 1, 2, 2], [1, 1, -1, -1, -1, -1, -1]]
    assert batch["labels"].tolist()[0] == [-100, -100, -100, 4, 5, -100, 6]
    assert batch["attention_mask"].sum(1).tolist() == [7, 2]
    assert batch["completions"].tolist() == [[2, 3], [5, -1], [7, -1]]
    assert batch["ends"].tolist() == [4, 6, 8]


@given(st.lists(rows(), min_size=1, max_size=4), st.booleans())
def test_each_place_predicts_its_graded_token(chosen: list[Branched], shared: bool) -> None:
    batch = branch_batch(chosen, shared=shared)
    assert ("branch_ids" in batch) is shared
    targets = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()
    wanted = [
        [token for token, flag in zip(c, row.flags(k), strict=True) if flag]
        for row in chosen
        for k, c in enumerate(row.completions)
    ]
    found = [[int(targets[p]) for p in line if p >= 0] for line in batch["completions"].tolist()]
    assert found == wanted
    last = [c[-1] for row in chosen for c in row.completions]
    assert batch["input_ids"].flatten()[batch["ends"]].tolist() == last
    assert int((batch["labels"][:, 1:] != -100).sum()) == sum(map(len, wanted))
    assert int(batch["attention_mask"].sum()) == (
        sum(row.tokens for row in chosen)
        if shared
        else sum(len(r.prompt) + len(c) for r in chosen for c in r.completions)
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Branched((), ((1,),), where="f:3"), "f:3: a prompt needs a token"),
        (lambda: Branched((1,), ()), "a completion needs a token"),
        (lambda: Branched((1,), ((2,), ())), "a completion needs a token"),
        (lambda: Branched((1,), ((2, 3),), ((True,),)), r"\[2\]; got \[1\]"),
        (lambda: branch_batch([]), "a batch needs a row"),
    ],
)
def test_what_cannot_be_laid_out(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()  # type: ignore[operator]
