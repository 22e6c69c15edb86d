"""What PEFT's configuration says of rank and scaling, for pairs whose applied form differs.

PEFT applies s·B A with s = alpha / r, or alpha / sqrt(r), r and alpha by module. What is written is
the pair as it is applied, and that may have another rank than the one that is trained: a start that
is subtracted beside the base (PiSSA, OLoRA) is a second pair, [A; A0] and [B, -B0], of rank 2r; p
independent parts of a fused projection are one block-diagonal pair of rank p·r. Then r and alpha
are rewritten: R as it lies in the file, alpha = s·R, by module where they differ, no square root.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.experts import ExpertLoRA, ExpertPair
from lora_core.adapters.lora import LoRA
from lora_core.adapters.lora_config import LoRAConfig
from lora_core.checkpoint.expert_files import taken_for_experts
from lora_core.targets import pattern_value, sites, unwrap

__all__ = ["applied_rank", "pairs_by_name", "record_for", "scaling_record", "stated_scalings"]


def pairs_by_name(adapters: Mapping[str, Adapter]) -> dict[str, LoRA | ExpertPair]:
    """The pairs of an adapter by what patterns are held against: sites, experts' parameters.

    Args:
        adapters: by site.

    Returns:
        {name: pair}; adapters that are no pairs are left out.
    """
    found: dict[str, LoRA | ExpertPair] = {}
    for site, adapter in adapters.items():
        if isinstance(adapter, LoRA):
            found[site] = adapter
        elif isinstance(adapter, ExpertLoRA):
            own = {f"{site}.{name}": adapter.pair(name) for name in adapter.pairs}
            found |= {name: pair for name, pair in own.items() if pair is not None}
    return found


def applied_rank(pair: LoRA | ExpertPair) -> int:
    """Rank R of the pair that is applied, which is the one on disk; of experts, of each."""
    if isinstance(pair, ExpertPair):
        return pair.r
    return pair.A.shape[0] if pair.A0 is None else 2 * pair.A.shape[0]


def scaling_record(config: LoRAConfig, pairs: Mapping[str, LoRA | ExpertPair]) -> dict[str, Any]:
    """PEFT's fields of rank and scaling.

    Args:
        config: the adapter's.
        pairs: `pairs_by_name`'s.

    Returns:
        {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}: the configuration's own
        where they describe every pair, else rewritten.
    """
    if all(_described(config, site, pair) for site, pair in pairs.items()):
        return {
            "r": config.r,
            "lora_alpha": whole(config.alpha),
            "rank_pattern": dict(config.rank_pattern),
            "alpha_pattern": {key: whole(value) for key, value in config.alpha_pattern.items()},
            "use_rslora": config.use_rslora,
        }
    ranks = {site: applied_rank(pair) for site, pair in pairs.items()}
    alphas = {site: whole(pair.scaling * ranks[site]) for site, pair in pairs.items()}
    r, rank_pattern = _by_module(ranks)
    alpha, alpha_pattern = _by_module(alphas)
    return {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": False,
    }


def record_for(
    model: nn.Module, config: LoRAConfig, adapters: Mapping[str, Adapter]
) -> dict[str, Any]:
    """`scaling_record` with patterns that mean in PEFT what they mean here.

    A router is a layer here; PEFT holds patterns against its parameter, `mlp.gate.weight`, as
    against that of any layer that is written so.

    Args:
        model: the model that has the adapter.
        config: the adapter's.
        adapters: by site.

    Returns:
        As `scaling_record`.
    """
    record = scaling_record(config, pairs_by_name(adapters))
    modules = dict(sites(model))
    layers = [s for s in adapters if getattr(unwrap(modules[s]), "why_dense", None) is not None]
    layers += taken_for_experts(model, adapters)

    def widened(key: str) -> str:
        meant = any(pattern_value({key: True}, site, False) for site in layers)
        return rf"(?:{key})(?:\.weight)?" if meant and not key.endswith(r"(?:\.weight)?") else key

    for option in ("rank_pattern", "alpha_pattern"):
        record[option] = {widened(key): value for key, value in record[option].items()}
    return record


def stated_scalings(raw: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Scaling of each pair in a file, as PEFT computes it.

    Args:
        raw: adapter_config.json.
        ranks: rows of A by site.

    Returns:
        {site: s}.

    Raises:
        ValueError: a value of another type or out of range, or a rank that A does not have.
    """
    try:
        stated = LoRAConfig(
            r=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
        )
    except TypeError as error:
        raise ValueError(str(error)) from None
    found = {}
    for site, rows in ranks.items():
        r = pattern_value(stated.rank_pattern, site, stated.r)
        alpha = pattern_value(stated.alpha_pattern, site, stated.alpha)
        if r != rows:
            raise ValueError(f"the configuration says rank {r} for {site!r}, its A has {rows} rows")
        found[site] = float(alpha / math.sqrt(r) if raw.get("use_rslora") else alpha / r)
    return found


def whole(value: float) -> float:
    """The number as an integer where it is one: what PEFT writes."""
    return int(value) if float(value).is_integer() else value


def _described(config: LoRAConfig, site: str, pair: LoRA | ExpertPair) -> bool:
    r = pattern_value(config.rank_pattern, site, config.r)
    alpha = pattern_value(config.alpha_pattern, site, config.alpha)
    scaling = alpha / math.sqrt(r) if config.use_rslora else alpha / r
    return applied_rank(pair) == r and pair.scaling == scaling


def _by_module(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and patterns for the sites that have another.

    A pattern is the last part of a name where all sites of that name agree, else the whole name;
    longer ones first, since a whole name also matches names that end with it.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    ends: dict[str, set[Any]] = {}
    for site, value in values.items():
        ends.setdefault(site.rsplit(".", 1)[-1], set()).add(value)
    named = {
        last if len(ends[last := site.rsplit(".", 1)[-1]]) == 1 else site: value
        for site, value in values.items()
        if ends[site.rsplit(".", 1)[-1]] != {common}
    }
    ordered = sorted(named, key=lambda key: (-key.count("."), key))
    return common, {re.escape(key): named[key] for key in ordered}
