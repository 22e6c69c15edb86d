"""A merged adapter is as fast as no adapter.

LoRA's update is a matrix of the layer's shape and can be added to the weight, after which the
computation is that of the base. One row is decoded a token at a time (batch 1, the case in which
adapters cost most); base, LoRA beside the weights, LoRA merged and bottleneck adapters take turns,
and the figure is the ratio to the base within a turn, so that what the machine does besides hits
all alike. "No latency": the interval of the ratio lies within 1 ± `MARGIN`.

There are two ways of being merged. `unload_adapters(model, merge=True)`, as `lora-core merge` does,
leaves plain layers, which is what the paper speaks of and what is judged. `merge_adapters(model)`
leaves the adapters in their places, so that they can be taken out again; each layer then asks
whether it is merged, and what that costs is in the table beside it.

Before anything is timed the merged model has to write what the unmerged one writes. A quiet machine
is needed; everything else here does without.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.papers.claim import Check, Claim, Finding, Settings
from benchmarks.papers.task import LORA
from lora_core.adapters import (
    BottleneckConfig,
    adapted_modules,
    add_adapter,
    merge_adapters,
    unload_adapters,
)
from lora_core.checkpoint import load_model
from lora_core.evaluate.estimate import Estimate, bootstrap
from lora_core.models import generate_ids

MARGIN = 0.03
TURNS, TOKENS, PROMPT = 60, 48, 64
WARM = 2  # turns that are not counted
MERGED, KEPT = "LoRA, merged", "LoRA, merged in place"


def models(settings: Settings) -> dict[str, Any]:
    """The base and copies with an adapter that changes what they say."""
    made: dict[str, Any] = {}
    configs = {
        "base": None,
        "LoRA, beside the weights": LORA,
        MERGED: LORA,
        KEPT: LORA,
        "bottleneck (Houlsby)": BottleneckConfig(reduction=16, placement="houlsby"),
    }
    for name, config in configs.items():
        model = load_model(settings.model, dtype=torch.float32)
        if config is not None:
            torch.manual_seed(0)
            add_adapter(model, config)
            shake(model)
        if name == MERGED:
            unload_adapters(model, merge=True)
        if name == KEPT:
            merge_adapters(model)
        made[name] = model.eval()
    return made


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Give every adapter an update that matters: a new one is the identity."""
    for _, host in adapted_modules(model):
        for parameter in host.adapters.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def check_same(one: nn.Module, other: nn.Module, ids: Tensor) -> None:
    """Refuse to time two models that compute something else.

    Raises:
        AssertionError: their logits differ by more than rounding.
    """
    with torch.no_grad():
        mine, theirs = (model(input_ids=ids).logits for model in (one, other))
    if not torch.allclose(mine, theirs, rtol=0, atol=1e-4 * float(mine.abs().max())):
        raise AssertionError("the merged model computes something else: nothing is timed")


def in_turns(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of each call in each turn, after turns that are not counted.

    The order is turned round from turn to turn, so that none always follows the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(-WARM, turns):
        for name in names if turn % 2 else reversed(names):
            began = time.perf_counter()
            calls[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(above: list[float], below: list[float]) -> Estimate:
    """Median over turns of the ratio of two times, turns resampled."""
    ratios = torch.tensor(above, dtype=torch.float64) / torch.tensor(below, dtype=torch.float64)

    def statistic(drawn: object) -> float:
        return float(ratios[torch.as_tensor(drawn)].quantile(0.5))

    return bootstrap(len(ratios), statistic, unit="turns")


def run(settings: Settings) -> Finding:
    """Time a token of each, in turns."""
    every = models(settings)
    vocabulary = every["base"].config.vocab_size
    ids = torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    for name in (MERGED, KEPT):
        check_same(every[name], every["LoRA, beside the weights"], ids)
    tokens, turns = (4, 3) if settings.quick else (TOKENS, TURNS)

    def call(model: nn.Module) -> Callable[[], object]:
        return lambda: generate_ids(model, ids, max_new_tokens=tokens)

    seconds = in_turns({name: call(model) for name, model in every.items()}, turns)
    ratios = {name: median_ratio(times, seconds["base"]) for name, times in seconds.items()}
    rows = []
    for name, times in seconds.items():
        fifths = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])) * 1e3 / tokens
        low, middle, high = fifths.tolist()
        rows.append(
            {
                "model": name,
                "ms a token": f"{middle:.3f} [{low:.3f}, {high:.3f}]",
                "ratio to the base": ratios[name],
            }
        )
    merged = ratios[MERGED]
    more = Estimate(merged.value - 1, merged.count, merged.low - 1, merged.high - 1, merged.unit)
    checks = [Check("time a token, merged / base − 1", more, "within", MARGIN)]
    return Finding(rows, checks, {"tokens": tokens, "prompt": PROMPT})


CLAIM = Claim(
    name="merged_latency",
    paper="Hu et al. 2021, arXiv:2106.09685, section 4.1 and table 1",
    says="merged adapters add no latency",
    run=run,
    scale="a token of this model takes a fraction of a millisecond of arithmetic on a CPU, and the "
    "calls around it weigh more than in GPT-2 medium on a GPU: what is not merged costs more",
)
