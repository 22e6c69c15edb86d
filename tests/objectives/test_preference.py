"""The losses on the loop: against a computation of single rows, however the pairs are cut."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core.adapters import LoRAConfig, PrefixTuningConfig, add_adapter, disable_adapters
from lora_core.data.pair_rows import PairRow, RatedRow
from lora_core.models import CausalLM, ModelConfig
from lora_core.objectives.kto import KTO
from lora_core.objectives.preference import (
    DPO,
    IPO,
    ORPO,
    Preference,
    PreferenceOptions,
    SimPO,
)
from lora_core.objectives.scoring import completion_log_probs
from lora_core.train import TrainConfig

PAIRS = [
    PairRow((5, 6, 7, 8), ((1, 2, 3), (4, 3)), where="p:1"),
    PairRow((11, 2), ((3, 4), (5, 6, 7, 8)), ((True, True), (True, False, True, True))),
    PairRow((2,), ((9,), (1, 1))),
    PairRow((4, 4), ((1, 2, 3, 4, 5), (6,))),
    PairRow((7, 3, 1), ((10, 10), (10, 9))),
]
RATED = [
    RatedRow(row.prompt, row.completions, row.graded, label=i % 2 == 0)
    for i, row in enumerate(PAIRS)
]
KINDS: dict[str, tuple[type[Preference], PreferenceOptions, float]] = {
    "dpo": (DPO, PreferenceOptions(beta=0.3), 0.1),
    "robust": (DPO, PreferenceOptions(beta=0.3, dpo_loss="robust"), 0.1),
    "hinge": (DPO, PreferenceOptions(beta=0.3, dpo_loss="hinge"), 0.0),
    "ipo": (IPO, PreferenceOptions(), 0.0),
    "simpo": (SimPO, PreferenceOptions(target_margin=0.7), 0.0),
    "orpo": (ORPO, PreferenceOptions(beta=0.4), 0.0),
}


def base() -> CausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "model_type": "llama"}
    made = CausalLM(ModelConfig.from_dict({**sizes, **heads}))
    made.init_weights(std=0.3)
    return made


@pytest.fixture
def model(shake: Callable[..., nn.Module]) -> nn.Module:
    """A decoder with an adapter that has learnt something."""
    made = base()
    add_adapter(made, LoRAConfig(r=2))
    return shake(made).train()


def setup(smoothing: float = 0.0, **training: Any) -> Any:
    said: list[str] = []
    return SimpleNamespace(
        method="lora",
        continued=None,
        training=TrainConfig(label_smoothing=smoothing, **training),
        settings=SimpleNamespace(train_on="assistant"),
        tok=SimpleNamespace(pad_id=0),
        device=torch.device("cpu"),
        said=said,
        say=said.append,
    )


def work(objective: Preference, model: nn.Module, rows: Any, run: Any) -> Any:
    objective.rows, objective.held_out = rows, None
    return objective.prepare(run, model)


def alone(model: nn.Module, prompt: Any, completion: Any, flags: Any) -> list[float]:
    """Log-probabilities of graded tokens by a row of its own and a softmax in float64."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        rows = model(ids).logits[0].double().log_softmax(-1)
    first = len(prompt)
    return [
        rows[first + i - 1, token].item()
        for i, (token, graded) in enumerate(zip(completion, flags, strict=True))
        if graded
    ]


def judged(model: nn.Module, rows: Any) -> list[tuple[list[float], ...]]:
    """Of each row both completions' log-probabilities: policy's, then the reference's."""
    found = []
    for row in rows:
        sides = [(row.prompt, row.completions[k], row.flags(k)) for k in (0, 1)]
        policy = [alone(model, *side) for side in sides]
        with disable_adapters(model):
            found.append((*policy, *(alone(model, *side) for side in sides)))
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def odds(x: float) -> float:
    return math.log(math.exp(x) / (1 - math.exp(x)))


def expected(kind: str, sides: tuple[list[float], ...]) -> tuple[float, float, float]:
    """A pair's loss and the rewards of either side, from the papers' formulas."""
    c, r, rc, rr = map(sum, sides)
    mc, mr, mrc, mrr = map(mean, sides)
    x = 0.3 * ((c - rc) - (r - rr))
    rewards = 0.3 * (c - rc), 0.3 * (r - rr)
    if kind == "dpo":
        return (-0.9 * math.log(sigmoid(x)) - 0.1 * math.log(sigmoid(-x)), *rewards)
    if kind == "robust":
        value = -0.9 * math.log(sigmoid(x)) + 0.1 * math.log(sigmoid(-x))
        return (value / 0.8, *rewards)
    if kind == "hinge":
        return (max(0.0, 1 - x), *rewards)
    if kind == "ipo":
        margin = (mc - mrc) - (mr - mrr)
        return ((margin - 5) ** 2, 0.1 * (mc - mrc), 0.1 * (mr - mrr))
    if kind == "simpo":
        return (-math.log(sigmoid(2 * (mc - mr) - 0.7)), 2 * mc, 2 * mr)
    return (-mc - 0.4 * math.log(sigmoid(odds(mc) - odds(mr))), 0.4 * mc, 0.4 * mr)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_the_papers_formula_of_single_rows(kind: str, model: nn.Module) -> None:
    cls, options, smoothing = KINDS[kind]
    made = work(cls(options), model, PAIRS, setup(smoothing))
    batch = made.collate(PAIRS)
    assert "branch_ids" in batch
    assert made.loss.count(batch) == len(PAIRS)
    result = made.loss(model, batch, 2.0)
    found = [expected(kind, sides) for sides in judged(model, PAIRS)]
    assert result.value.item() == pytest.approx(sum(f[0] for f in found) / 2, rel=2e-5)
    figures = {name: float(total) / count for name, (total, count) in result.figures.items()}
    for name, value in {
        "rewards/chosen": mean([f[1] for f in found]),
        "rewards/rejected": mean([f[2] for f in found]),
        "margin": mean([f[1] - f[2] for f in found]),
        "accuracy": mean([float(f[1] > f[2]) for f in found]),
        "log_probs/chosen": mean([sum(sides[0]) for sides in judged(model, PAIRS)]),
        "log_probs/rejected": mean([sum(sides[1]) for sides in judged(model, PAIRS)]),
    }.items():
        assert figures[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert 0 < figures["accuracy"] < 1  # else the test says nothing of it


@pytest.mark.parametrize("count", [2, 5])
def test_kto_is_the_papers_formula_of_single_rows(model: nn.Module, count: int) -> None:
    # of two rows the baseline is above 0, and above a bad row's gain; of five it is cut off there
    rows = RATED[:count]
    options = PreferenceOptions(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    made = work(KTO(options), model, rows, setup())
    batch = made.collate(rows)
    sides = judged(model, rows)
    gains = [sum(own) - sum(ref) for own, _, ref, _ in sides]
    kl = max(0.0, mean([sum(other) - sum(ref) for _, other, _, ref in sides]))
    assert (kl > 0) == (count == 2)
    values = [
        1.5 * (1 - sigmoid(0.3 * (gain - kl)))
        if row.label
        else 0.5 * (1 - sigmoid(0.3 * (kl - gain)))
        for gain, row in zip(gains, rows, strict=True)
    ]
    assert made.loss.count(batch) == len(rows)
    result = made.loss(model, batch, 3.0)
    assert result.value.item() == pytest.approx(sum(values) / 3, rel=2e-5)
    figures = {name: float(total) / count for name, (total, count) in result.figures.items()}
    good = [0.3 * g for g, row in zip(gains, rows, strict=True) if row.label]
    bad = [0.3 * g for g, row in zip(gains, rows, strict=True) if not row.label]
    right = [g > 0.3 * kl for g in good] + [g < 0.3 * kl for g in bad]
    assert figures["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert figures["rewards/desirable"] == pytest.approx(mean(good), rel=1e-4)
    assert figures["rewards/undesirable"] == pytest.approx(mean(bad), rel=1e-4)
    assert figures["accuracy"] == pytest.approx(mean([float(r) for r in right]))
    margins = [g - 0.3 * kl for g in good] + [0.3 * kl - b for b in bad]
    assert figures["margin"] == pytest.approx(mean(margins), rel=1e-4, abs=1e-6)


def test_ktos_baseline_has_no_gradient_and_one_kind_alone_no_figure(model: nn.Module) -> None:
    made = work(KTO(PreferenceOptions(beta=0.3)), model, RATED, setup())
    good = [row for row in RATED if row.label]
    result = made.loss(model, made.collate(good), 1.0)
    assert result.figures["rewards/undesirable"][1] == 0
    # (1 - sigmoid) with the baseline held fixed: its slope is that of -sigmoid(r - kl)
    batch = made.collate(good)
    after, before = (
        completion_log_probs(model, batch)[0],
        made.loss.reference.log_probs(model, batch),
    )
    gains = (after - before).sum(1)
    kl = gains[1::2].mean().clamp(min=0).item()
    (-torch.sigmoid(0.3 * (gains[::2] - kl)).sum()).backward()  # type: ignore[no-untyped-call]
    wanted = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert kl > 0
    assert apart(gradient(made, model, [good]) * len(good), wanted) < 5e-5


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def gradient(made: Any, model: nn.Module, cuts: list[list[Any]]) -> Tensor:
    batches = [made.collate(rows) for rows in cuts]
    total = sum(made.loss.count(batch) for batch in batches)
    model.zero_grad()
    for batch in batches:
        made.loss(model, batch, total).value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_does_not_depend_on_how_pairs_are_cut(kind: str, model: nn.Module) -> None:
    cls, options, smoothing = KINDS[kind]
    made = work(cls(options), model, PAIRS, setup(smoothing))
    whole = gradient(made, model, [PAIRS])
    assert whole.abs().max() > 0
    for cuts in ([PAIRS[:2], PAIRS[2:]], [[row] for row in PAIRS], [PAIRS[3:], PAIRS[:3]]):
        assert apart(gradient(made, model, cuts), whole) < 5e-5


@pytest.mark.parametrize("cls", [DPO, IPO, SimPO, ORPO, KTO])
def test_a_prompt_of_its_own_changes_nothing(cls: type[Preference], model: nn.Module) -> None:
    rows = RATED if cls is KTO else PAIRS
    run = setup()
    made = work(cls(PreferenceOptions()), model, rows, run)
    assert "completions share their prompt's computation" in run.said
    shared = gradient(made, model, [rows])
    made.collate = cls(PreferenceOptions()).collate(False, 0)
    assert apart(gradient(made, model, [rows]), shared) < 5e-5


def test_at_the_start_dpo_is_ln_2_whatever_the_smoothing() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    made = CausalLM(
        ModelConfig.from_dict({**sizes, "num_attention_heads": 2, "model_type": "llama"})
    )
    made.init_weights(std=0.3)
    add_adapter(made, LoRAConfig(r=2))
    for loss, smoothing in (("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2)):
        options = PreferenceOptions(dpo_loss=loss)  # type: ignore[arg-type]  # one of them
        ready = work(DPO(options), made, PAIRS, setup(smoothing))
        result = ready.loss(made.train(), ready.collate(PAIRS), len(PAIRS))
        assert result.value.item() == pytest.approx(math.log(2), rel=1e-6)
        assert float(result.figures["margin"][0]) == 0


# --- what is refused ---


@pytest.mark.parametrize(
    ("cls", "options", "training", "said"),
    [
        (DPO, {"target_margin": 2.0}, {}, "--target-margin is no option of dpo"),
        (IPO, {"dpo_loss": "hinge"}, {}, "--dpo-loss is no option of ipo"),
        (SimPO, {"desirable_weight": 2.0}, {}, "--desirable-weight is no option of simpo"),
        (KTO, {"dpo_loss": "robust"}, {}, "--dpo-loss is no option of kto"),
        (IPO, {}, {"label_smoothing": 0.1}, "label_smoothing is 0.1, but ipo smooths nothing"),
        (KTO, {}, {"label_smoothing": 0.1}, "label_smoothing is 0.1, but kto smooths nothing"),
        (DPO, {"dpo_loss": "hinge"}, {"label_smoothing": 0.1}, "but dpo smooths nothing"),
        (DPO, {}, {"label_smoothing": 0.5}, "label_smoothing must be below 0.5 for dpo"),
        (DPO, {}, {"packing": 64}, "packing lays out single sequences"),
        (ORPO, {}, {"group_by_length": True}, "group_by_length lays out single sequences"),
        (KTO, {}, {"batch_size": 1}, "batch_size must be 2 or more; got 1"),
    ],
)
def test_settings_that_do_not_go_together(
    cls: type[Preference], options: dict[str, Any], training: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        cls(PreferenceOptions(**options)).check(setup(**{"smoothing": 0.0} | _named(training)))


def _named(training: dict[str, Any]) -> dict[str, Any]:
    return {"smoothing" if k == "label_smoothing" else k: v for k, v in training.items()}


def test_the_whole_text_is_not_graded() -> None:
    run = setup()
    run.settings.train_on = "all"
    with pytest.raises(ValueError, match="train_on all grades the prompt, which simpo does not"):
        SimPO(PreferenceOptions()).check(run)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.0}, "beta must be a number above 0; got 0.0"),
        ({"beta": math.inf}, "beta must be a number above 0"),
        ({"dpo_loss": "ipo"}, "dpo_loss must be sigmoid, robust or hinge; got 'ipo'"),
        ({"target_margin": -1.0}, "target_margin must be 0 or more; got -1.0"),
        ({"undesirable_weight": math.nan}, "undesirable_weight must be 0 or more; got nan"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PreferenceOptions(**options)


def test_weights_of_nothing() -> None:
    with pytest.raises(ValueError, match="are both 0: nothing is left to learn"):
        KTO(PreferenceOptions(desirable_weight=0.0, undesirable_weight=0.0))


def test_dropout_is_refused_beside_a_reference_and_turned_off_in_what_goes_on(
    model: nn.Module,
) -> None:
    with pytest.raises(ValueError, match=r"dropout is 0.1, and dpo compares the policy"):
        DPO(PreferenceOptions()).adapt(LoRAConfig(dropout=0.1))
    assert SimPO(PreferenceOptions()).adapt(LoRAConfig(dropout=0.1)).dropout == 0.1
    assert DPO(PreferenceOptions()).adapt(None) is None
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5  # type: ignore[assignment]
    run = setup()
    made = work(DPO(PreferenceOptions()), model, PAIRS, run)
    assert run.said[1].startswith("note: dropout is off in 16 modules")
    batch = made.collate(PAIRS)
    values = [made.loss(model.train(), batch, 1.0).value.item() for _ in range(2)]
    assert values[0] == values[1]


def test_a_fresh_prefix_is_not_its_reference_and_that_is_said() -> None:
    run = setup()
    run.method = "prefix"
    plain = base()
    add_adapter(plain, PrefixTuningConfig(num_virtual_tokens=2))
    work(IPO(PreferenceOptions()), plain, PAIRS, run)
    assert any("a fresh prefix changes the model before anything is learned" in s for s in run.said)


def test_the_recorded_options_name_the_beta_that_is_used() -> None:
    assert SimPO(PreferenceOptions()).facts()["beta"] == 2.0
    assert DPO(PreferenceOptions()).facts()["beta"] == 0.1
    assert DPO(PreferenceOptions(beta=0.5)).facts()["beta"] == 0.5
