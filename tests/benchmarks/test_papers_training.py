"""Papers' claims about training: how figures become tables and verdicts, on made-up figures."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

FULL_RUN = os.environ.get("LORA_TEST_FULL") == "1"
Papers = Callable[[str], ModuleType]
NOISE = (0.0, 0.001, -0.001)  # of three seeds, the same on both sides of a pair
WIDE = (0.3, -0.3, 0.0)


@pytest.fixture(scope="session")
def tuned(papers: Papers) -> Callable[..., Any]:
    """A variant at its best rate, by the losses of its seeds."""
    score = papers("task").Score

    def make(
        losses: Sequence[float],
        *,
        lr: float = 4e-3,
        general: Sequence[float] | None = None,
        exact: Sequence[bool] | None = None,
        **facts: Sequence[Any],
    ) -> Any:
        scores = [
            score(
                loss=loss,
                nll=[],
                tokens=[],
                exact=None if exact is None else list(exact),
                general=None if general is None else general[i],
                facts={name: values[i] for name, values in facts.items()},
            )
            for i, loss in enumerate(losses)
        ]
        return papers("rates").Tuned(lr, scores, {2e-3: 9.0, lr: losses[0], 8e-3: 9.0})

    return make


def seeds(middle: float, spread: Sequence[float] = NOISE) -> list[float]:
    return [middle + x for x in spread]


# --- the search for a rate ----------------------------------------------------------------------


@dataclasses.dataclass
class Asked:
    """What stands in for `score`: the loss by rate, and a log of what was asked."""

    losses: Mapping[float, float]
    log: list[tuple[float, int, bool]]

    def __call__(self, settings: Any, variant: Any, seed: int, general: bool = False) -> Any:
        self.log.append((variant.lr, seed, general))
        return type(
            "Score", (), {"loss": self.losses[variant.lr], "general": 1.5 if general else None}
        )


@pytest.fixture
def asked(papers: Papers, monkeypatch: pytest.MonkeyPatch) -> Asked:
    made = Asked({2e-3: 0.5, 4e-3: 0.2, 8e-3: 0.3}, [])
    monkeypatch.setattr(papers("rates"), "score", made)
    return made


@pytest.fixture
def settings(papers: Papers, tmp_path: Path) -> Any:
    return papers("claim").Settings(model=tmp_path, out=tmp_path, seeds=(5, 6, 7))


def test_rates_are_searched_on_the_first_seed_alone(
    papers: Papers, asked: Asked, settings: Any
) -> None:
    rates = papers("rates")
    found = rates.at_best(settings, rates.lora(settings), (2e-3, 4e-3, 8e-3), general=True)
    assert found.lr == 4e-3
    assert found.searched == asked.losses
    searches, runs = asked.log[:3], asked.log[3:]
    assert searches == [(2e-3, 5, False), (4e-3, 5, False), (8e-3, 5, False)]
    assert runs == [(4e-3, 5, True), (4e-3, 6, True), (4e-3, 7, True)]
    assert found.losses == [0.2] * 3
    assert found.general == [1.5] * 3
    assert found.rate == "0.004"


def test_a_best_rate_at_an_end_is_marked(papers: Papers, asked: Asked, settings: Any) -> None:
    rates = papers("rates")
    asked.losses = {1e-3: 0.9, 2e-3: 0.5, 4e-3: 0.2}
    found = rates.at_best(settings, rates.lora(settings), tuple(asked.losses))
    assert found.rate == "0.004 (end of the list)"
    alone = rates.at_best(settings, rates.lora(settings), (4e-3,))
    assert alone.rate == "0.004"  # nothing was searched
    assert all(math.isnan(x) for x in alone.general)


def test_the_shared_runs_see_each_row_once(papers: Papers, settings: Any) -> None:
    rates, task = papers("rates"), papers("task")
    steps = rates.few_steps(settings)
    assert 0 < steps < settings.steps
    for variant in (rates.lora(settings), rates.full(settings)):
        assert variant.rows == steps * variant.batch_size
        assert variant.steps == steps
    assert rates.full(settings).full
    assert rates.full(settings).adapter is None
    assert rates.lora(settings, lora_plus=16.0).adapter == task.LORA


def test_pictures_of_other_settings_stay_off_the_page(papers: Papers, papers_settings: Any) -> None:
    curves = {"LoRA": [[(4.0, 0.0), (0.2, 0.9)]], "full": [[(4.0, 0.0), (0.1, 0.5), (0.3, 0.7)]]}
    figure = papers("full_vs_lora").drawn(curves)
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["LoRA", "full"]
    assert list(lines[1].get_xdata()) == [4.0, 0.1]  # what learnt less is left out
    assert papers("rates").picture(papers_settings, "some", figure) == "papers/some.png"
    made = papers_settings.out / "papers" / "some.png"
    assert made.read_bytes()[1:4] == b"PNG"
    assert not (papers("rates").PICTURES / "some.png").exists()


# --- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "verdict"),
    [
        (seeds(0.15), "agrees"),
        (seeds(0.55), "disagrees"),
        (seeds(0.15, WIDE), "undecided"),
        (seeds(0.205, (0.01, -0.01, 0.0)), "undecided"),  # the interval meets the margin
    ],
)
def test_ranks_agree_where_all_are_level(
    papers: Papers, tuned: Callable[..., Any], first: list[float], verdict: str
) -> None:
    claim = papers("rank_sweep")
    losses = {r: seeds(0.14) for r in claim.RANKS} | {1: first}
    finding = claim.judge({r: tuned(x, trained=[r] * 3) for r, x in losses.items()}, seeds(3.14))
    assert finding.verdict == verdict
    assert finding.figures["margin"] == pytest.approx(0.06)  # 2 % of 3.14 - 0.14
    assert len(finding.checks) == len(claim.RANKS) - 1
    assert [row["r"] for row in finding.rows] == list(claim.RANKS)
    assert finding.rows[0]["trained"] == 1


@pytest.mark.parametrize(
    ("values", "attention", "verdict"),
    [
        (seeds(0.3), seeds(0.2), "agrees"),
        (seeds(0.3), seeds(0.1), "disagrees"),
        (seeds(0.3), seeds(0.2, WIDE), "undecided"),
    ],
)
def test_all_layers_have_to_beat_each_part_of_attention(
    papers: Papers,
    tuned: Callable[..., Any],
    values: list[float],
    attention: list[float],
    verdict: str,
) -> None:
    claim = papers("targets")
    names = (claim.ALL, *claim.PARTS, claim.FULL)
    losses = (seeds(0.15), values, attention, seeds(0.05))
    finding = claim.judge({n: tuned(x) for n, x in zip(names, losses, strict=True)})
    assert finding.verdict == verdict
    assert [check.difference.value for check in finding.checks] == pytest.approx(
        [0.15 - values[0], 0.15 - sum(attention) / 3]
    )


@pytest.mark.parametrize(
    ("plain_norm", "stable_norm", "stable_loss", "verdict"),
    [
        (0.25, 1.1, 0.2, "agrees"),
        (0.25, 1.1, 0.9, "disagrees"),  # higher ranks learn worse
        (1.5, 1.1, 0.2, "disagrees"),  # the gradient does not collapse
        (0.25, 4.1, 0.2, "disagrees"),  # two doublings are not steady
        (0.25, 1.1, 0.5, "undecided"),
    ],
)
def test_rslora_needs_gradients_and_losses(
    papers: Papers,
    tuned: Callable[..., Any],
    plain_norm: float,
    stable_norm: float,
    stable_loss: float,
    verdict: str,
) -> None:
    claim = papers("rslora")

    def runs(losses: Sequence[float], norms: Sequence[float]) -> dict[int, Any]:
        return {
            r: tuned(seeds(loss), grad_norm=[[norm, norm], [norm, None], [norm]]).scores
            for r, loss, norm in zip((8, 64, 128), losses, norms, strict=True)
        }

    plain = runs((0.5, 0.5, 0.501), (1.0, 0.5, plain_norm))
    stable = runs((0.5, 0.4, stable_loss), (1.0, 1.0, stable_norm))
    middle = tuned(seeds(0.1), grad_norm=[[1.0]] * 3)
    finding = claim.judge(plain, stable, middle, middle)
    if verdict == "undecided":  # the same seeds, spread apart
        stable[128] = tuned(seeds(stable_loss, WIDE), grad_norm=[[stable_norm]] * 3).scores
        finding = claim.judge(plain, stable, middle, middle)
    assert finding.verdict == verdict
    assert finding.checks[0].difference.value == pytest.approx(math.log2(plain_norm))
    assert len(finding.rows) == 8
    assert finding.rows[3]["rate"] == "its best, 0.004"


def test_both_scalings_share_the_lowest_rank(papers: Papers) -> None:
    adapter = papers("rslora").adapter
    low = adapter(8, rs=True)
    assert low == adapter(8, rs=False)
    for r in (64, 128):
        one = adapter(r, rs=True)
        assert one.use_rslora
        assert one.alpha / math.sqrt(r) == pytest.approx(low.alpha / 8 * math.sqrt(8 / r))
        assert adapter(r, rs=False).alpha == low.alpha


@pytest.mark.parametrize(
    ("highest", "verdict"),
    [
        (seeds(3.0), "agrees"),
        (seeds(2.0), "disagrees"),
        (seeds(2.6, WIDE), "undecided"),
        (None, "undecided"),  # one seed alone
    ],
)
def test_each_higher_rate_has_to_forget_more(
    papers: Papers, tuned: Callable[..., Any], highest: list[float] | None, verdict: str
) -> None:
    claim = papers("forgetting_lr")
    general = {1e-3: seeds(2.1), 4e-3: seeds(2.5), 1.6e-2: highest or seeds(3.0)}
    found = {
        name: {
            lr: tuned(seeds(0.1), general=bits).scores[: 3 if highest else 1]
            for lr, bits in general.items()
        }
        for name in ("LoRA", "full")
    }
    finding = claim.judge(found, 2.0)
    assert finding.verdict == verdict
    assert finding.rows[0]["forgotten, bits per byte"].value == pytest.approx(0.1)
    assert len(finding.checks) == 4


@pytest.mark.parametrize(
    ("loss", "lost", "verdict"),
    [
        (seeds(0.2), seeds(2.3), "agrees"),
        (seeds(0.2), seeds(2.9), "disagrees"),
        (seeds(0.05), seeds(2.3), "disagrees"),
        (seeds(0.2), seeds(2.5, WIDE), "undecided"),
    ],
)
def test_lora_has_to_learn_less_and_forget_less(
    papers: Papers, tuned: Callable[..., Any], loss: list[float], lost: list[float], verdict: str
) -> None:
    claim = papers("full_vs_lora")
    best = {"LoRA": tuned(loss, general=lost), "full": tuned(seeds(0.1), general=seeds(2.5))}
    curves = {"LoRA": [[(4.0, 0.0), (0.1, 0.9)]] * 3, "full": [[(4.0, 0.0), (0.2, 0.4)]] * 3}
    finding = claim.judge(best, curves, 2.0)
    assert finding.verdict == verdict
    # at a loss of 0.2 LoRA's line has gone log(20) / log(40) of its way
    expected = 0.9 * math.log(20) / math.log(40) - 0.4
    assert finding.figures["at_the_same_loss"]["value"] == pytest.approx(expected)
    assert len(finding.rows) == 5


def test_curves_are_read_where_both_reach(papers: Papers) -> None:
    claim = papers("full_vs_lora")
    curve = [(4.0, 0.0), (1.0, 0.2), (0.25, 0.6), (0.5, 3.0)]  # the last rate learnt less
    assert claim.rising(curve) == curve[:3]
    assert claim.forgotten_at(curve, 4.0) == 0
    assert claim.forgotten_at(curve, 0.5) == pytest.approx(0.4)
    assert claim.forgotten_at(curve, 0.25) == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"losses from 0\.25 to 4; 0\.1 is not among them"):
        claim.forgotten_at(curve, 0.1)
    losses, (one, other) = claim.matched([curve], [[(4.0, 0.0), (1.0, 0.5)]])
    assert losses == [1.0]
    assert one == pytest.approx([0.2])
    assert other == pytest.approx([0.5])


@given(
    losses=st.lists(st.floats(0.01, 3.9), min_size=1, max_size=5, unique=True),
    share=st.floats(0, 1),
)
def test_a_curve_between_its_points_lies_between_their_figures(
    papers: Papers, losses: list[float], share: float
) -> None:
    claim = papers("full_vs_lora")
    curve = [(4.0, 0.0), *((loss, float(i)) for i, loss in enumerate(losses, 1))]
    least = min(losses)
    lost = claim.forgotten_at(curve, least + share * (4.0 - least))
    assert 0 <= lost <= claim.rising(curve)[-1][1]


@pytest.mark.parametrize(
    ("module", "masked", "everything", "verdict"),
    [
        ("loss_mask", seeds(0.1), seeds(0.3), "agrees"),
        ("loss_mask", seeds(0.3), seeds(0.1), "disagrees"),
        ("loss_mask", seeds(0.1), seeds(0.1, WIDE), "undecided"),
        ("loss_on_questions", seeds(0.3), seeds(0.1), "agrees"),
        ("loss_on_questions", seeds(0.1), seeds(0.3), "disagrees"),
        ("loss_on_questions", seeds(0.1), seeds(0.1, WIDE), "undecided"),
    ],
)
def test_two_papers_say_the_opposite_of_the_mask(
    papers: Papers,
    tuned: Callable[..., Any],
    module: str,
    masked: list[float],
    everything: list[float],
    verdict: str,
) -> None:
    finding = papers(module).judge(tuned(masked, exact=[True, False]), tuned(everything))
    assert finding.verdict == verdict
    assert finding.rows[0]["exact match"].value == 0.5
    assert "exact match" not in finding.rows[1]  # none was asked for


FALLING = [4 / i for i in range(1, 17)]


@pytest.mark.parametrize(
    ("losses", "curve", "verdict"),
    [
        (seeds(0.1), [1.0, 0.5, 0.4] + [0.1] * 13, "agrees"),
        (seeds(0.3), [1.0, 0.5, 0.4] + [0.1] * 13, "disagrees"),  # faster, and worse in the end
        (seeds(0.1), [5.0] * 16, "undecided"),  # never there: as slow as LoRA, which proves nothing
        (seeds(0.2, WIDE), [1.0, 0.5, 0.4] + [0.1] * 13, "undecided"),
    ],
)
def test_lora_plus_has_to_be_better_and_faster(
    papers: Papers,
    tuned: Callable[..., Any],
    losses: list[float],
    curve: list[float],
    verdict: str,
) -> None:
    claim = papers("lora_plus")
    plain = tuned(seeds(0.2), loss=[FALLING] * 3)
    finding = claim.judge(plain, tuned(losses, lr=1e-3, loss=[curve] * 3))
    assert finding.verdict == verdict
    assert finding.rows[1]["rate of B"] == "0.016"


def test_steps_to_a_level_are_counted_on_the_mean_of_the_last(papers: Papers) -> None:
    claim = papers("lora_plus")
    losses = [8.0, *[0.0] * 7, 0.0, 9.0]
    assert claim.smoothed(losses) == [8.0 / i for i in range(1, 9)] + [0.0, 9 / 8]
    assert claim.steps_to(losses, 2.0) == 4
    assert claim.steps_to(losses, 0.0) == 9
    assert claim.steps_to(losses, -1.0) == 10  # never: all of them


@pytest.mark.parametrize(
    ("lora", "full", "verdict"),
    [
        (["a b c d", "e f g h"], ["a b c d", "a b c d"], "agrees"),
        (["a b c d", "a b c d"], ["a b c d", "e f g h"], "disagrees"),
        (["a b c d", "a b c d"], ["a b c d", "a b c d"], "undecided"),  # both alike
    ],
)
def test_variety_has_to_fall_in_order(
    papers: Papers, lora: list[str], full: list[str], verdict: str
) -> None:
    claim = papers("diversity")
    base = ["a b a c", "e f g h", "i j k l"]  # words come twice, pairs do not
    repeated = "x y x y x y x y"
    written = {
        "base": [claim.Texts([base])] * 3,
        "LoRA": [claim.Texts([[*lora, repeated]])] * 3,
        "full": [claim.Texts([[*full, repeated]])] * 3,
    }
    finding = claim.judge(written)
    assert finding.verdict == verdict
    assert finding.rows[0]["distinct-2 of a prefix's samples"].value == 1
    assert finding.rows[1]["repeated 4-grams"].value == pytest.approx(3 / 5 / 3)


# --- on a tiny model ----------------------------------------------------------------------------


def test_attention_alone_gets_the_rank_of_equal_size(papers: Papers, papers_settings: Any) -> None:
    claim = papers("targets")
    # of a layer: q, k, v, o 32 × 32, gate, up, down 32 × 64
    every, part = 4 * 64 + 3 * 96, 2 * 64
    found = claim.rank_of_equal_size(papers_settings, ["q_proj", "v_proj"])
    assert found == round(16 * every / part)


def test_samples_are_drawn_once_and_repeat(
    papers: Papers, papers_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, task = papers("diversity"), papers("task")
    for name, count in (("PREFIX_TOKENS", 8), ("NEW_TOKENS", 5), ("PREFIXES", 2)):
        monkeypatch.setattr(claim, name, count)
    found = claim.samples(papers_settings, task.BASE, 0)
    starts = claim.prefixes(papers_settings)
    assert len(found.samples) == len(starts) >= 2
    assert {len(texts) for texts in found.samples} == {claim.SAMPLES}
    assert all(len(start) <= 8 for start in starts)
    assert len(set(found.samples[0])) > 1  # sampled, not greedy
    tok = claim.load_tokenizer(papers_settings.model)
    model = task.trained(papers_settings, task.BASE, 0)
    assert claim.written_by(model, tok, starts, 0) == found.samples
    assert claim.written_by(model, tok, starts, 1) != found.samples
    monkeypatch.setattr(claim, "written_by", None)  # a second call does not draw
    assert claim.samples(papers_settings, task.BASE, 0) == found


SMALL: dict[str, dict[str, Any]] = {
    "rank_sweep": {"RANKS": (1, 16, 32), "LORA_RATES": (1e-3,)},
    "targets": {"LORA_RATES": (1e-3,), "FULL_RATES": (1e-3,), "FEW_RATES": (1e-3,), "PARTS": {}},
    "rslora": {"RANKS": (8, 16, 32), "BEST": {False: (1e-3,), True: (1e-3,)}},
    "forgetting_lr": {},
    "full_vs_lora": {},
    "loss_mask": {"LORA_RATES": (1e-3,)},
    "loss_on_questions": {"ROWS": 4},
    "lora_plus": {"LORA_RATES": (1e-3,), "RATES": (1e-3,)},
    "diversity": {"PREFIX_TOKENS": 8, "NEW_TOKENS": 5},
}
QUICK = ("lora_plus", "rslora")


@pytest.mark.parametrize("name", SMALL if FULL_RUN else QUICK)
def test_claims_run_on_a_tiny_model(
    papers: Papers, papers_settings: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    torch.manual_seed(0)
    claim = papers(name)
    for key, value in SMALL[name].items():
        monkeypatch.setattr(claim, key, value)
    monkeypatch.setattr(papers("forgetting_lr"), "RATES", {"LoRA": (1e-3,), "full": (1e-3,)})
    finding = claim.CLAIM.run(papers_settings)
    assert finding.verdict in ("agrees", "disagrees", "undecided")
    assert len({tuple(row) for row in finding.rows}) == 1  # one table, one heading
    for check in finding.checks:
        assert math.isfinite(check.difference.value), check
        assert check.difference.count == len(papers_settings.seeds)
    if "picture" in finding.figures:
        assert (papers_settings.out / finding.figures["picture"]).is_file()
