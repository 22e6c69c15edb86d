"""General text shown again: how much, which of it, and with what name."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import TextWindows
from lora_core.data.replay import JoinedRows, draw_replay


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    tokens=st.integers(1000, 5000),
    share=st.sampled_from([0.05, 0.25, 0.5, 0.9]),
    seed=st.integers(0, 99),
)
def test_the_share_is_kept_to_half_a_row(
    lengths: list[int], tokens: int, share: float, seed: int
) -> None:
    chosen = draw_replay(lengths, tokens, share, seed)
    drawn = sum(lengths[i] for i in chosen)
    assert abs(drawn - share / (1 - share) * tokens) <= max(lengths) / 2
    shown = Counter(chosen)
    times = [shown[i] for i in range(len(lengths))]
    assert max(times) - min(times) <= 1  # each once before any twice
    assert chosen == draw_replay(lengths, tokens, share, seed)


def test_another_seed_draws_other_rows() -> None:
    assert draw_replay([10] * 100, 1000, 0.25, 0) != draw_replay([10] * 100, 1000, 0.25, 1)


def test_what_cannot_be_drawn_is_refused() -> None:
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="replay_share must be above 0 and below 1; got"):
            draw_replay([10], 100, share, 0)
    with pytest.raises(ValueError, match="there is no row to replay"):
        draw_replay([], 100, 0.5, 0)
    with pytest.raises(
        ValueError, match=r"replay_share 0.01 of 100 tokens is less than half a row"
    ):
        draw_replay([10], 100, 0.01, 0)


def test_joined_rows_bear_the_name_of_their_source() -> None:
    text, general = ([{"input_ids": [i] * n, "labels": [i] * n} for i in range(3)] for n in (2, 5))
    rows = JoinedRows([("text", text, range(3)), ("replay", general, [2, 0, 2])])
    assert len(rows) == 6
    assert [row["source"] for row in rows] == ["text"] * 3 + ["replay"] * 3
    assert [row["input_ids"][0] for row in rows] == [0, 1, 2, 2, 0, 2]
    assert rows.lengths == [2, 2, 2, 5, 5, 5]
    assert [row["input_ids"] for row in rows[2:4]] == [[2, 2], [2] * 5]
    assert rows[-1] == {"input_ids": [2] * 5, "labels": [2] * 5, "source": "replay"}


def test_windows_over_documents_that_are_tokenised() -> None:
    rows = TextWindows.from_rows([{"input_ids": [1, 2, 0]}, {"input_ids": [3, 4, 5, 0]}], 3)
    assert [row["input_ids"] for row in rows] == [[1, 2, 0], [3, 4, 5]]
    assert rows.dropped == 1
    assert rows.lengths == [3, 3]
    short = TextWindows.from_rows([{"input_ids": [1, 2, 0]}], 2048)
    assert [row["labels"] for row in short] == [[1, 2, 0]]
    with pytest.raises(ValueError, match="1 tokens do not fill one window of 2"):
        TextWindows.from_rows([{"input_ids": [1]}], 8)
