"""AdapterHub's configuration of a bottleneck (their BnConfig), from and to our own.

Their options say in which order a layer adds its residual, its norm and the adapter. With h, r, f
and LN as in adapters/adapterhub.py, `residual_before_ln` deciding what is added to f's output:

    is_parallel  original_ln_before  original_ln_after  residual_before_ln
    true         any                 true               any                 sees="residual"
    false        false               true               true, false         sees="output"
    false        true                true               true                sees="sum"
    false        true                false              false               sees="normed"; "sum" in
                                                                            a pre-norm model

The other combinations lose r or add it twice (or end in an error there), and are refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_core.adapters.adapterhub import AdapterHubConfig
from lora_core.adapters.bottleneck import BottleneckAdapter, BottleneckConfig

__all__ = ["config_from", "config_to"]

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "leakyrelu": "leaky_relu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
WRITTEN_AS = {"gelu_tanh": "gelu_new", "leaky_relu": "leakyrelu", "silu": "swish"}
# files without a version were written when these names meant something else
RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}

# BnConfig as their library writes it, with its defaults
DEFAULTS: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "dropout": 0.0,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights": "mam_adapter",  # `up` from zero: how an adapter made here starts
    "init_weights_seed": None,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "is_parallel": False,
    "learn_phm": True,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "mh_adapter": False,
    "non_linearity": "relu",
    "original_ln_after": True,
    "original_ln_before": False,
    "output_adapter": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_layer": False,
    "phm_rank": 1,
    "reduction_factor": 16,
    "residual_before_ln": True,
    "scaling": 1.0,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
# what they compute with, and what is not computed here; the rest of DEFAULTS belongs to these or
# to the start of the training
USED = (
    "dropout",
    "is_parallel",
    "leave_out",
    "mh_adapter",
    "non_linearity",
    "original_ln_after",
    "original_ln_before",
    "output_adapter",
    "reduction_factor",
    "residual_before_ln",
    "scaling",
)
REQUIRED = ("mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
REFUSED = ("cross_adapter", "ln_after", "ln_before", "phm_layer", "stochastic_depth", "use_gating")
# options of old versions that nothing reads any more
FORGOTTEN = ("attention_type", "invertible_adapter", "new_attention_norm")


def config_from(
    record: Mapping[str, Any], post_norm: bool, keys: Iterable[str] = ()
) -> AdapterHubConfig:
    """Translate the configuration of a file.

    Args:
        record: the content of their adapter_config.json.
        post_norm: whether the model has its norms after the sums.
        keys: those of the weights; they tell whether an invertible adapter is really there.

    Returns:
        The configuration that computes the same.

    Raises:
        ValueError: another kind of adapter, an option that is not supported or not known.
    """
    raw = dict(record["config"])
    if (kind := raw.pop("architecture", None)) is not None:
        raise ValueError(f"architecture {kind!r} is no bottleneck: only bottlenecks are read")
    _refuse_options(raw, record, keys)
    if missing := [key for key in REQUIRED if key not in raw]:
        raise ValueError(f"the config has no {missing[0]!r}: it is no bottleneck of AdapterHub's")
    used = {key: raw.get(key, DEFAULTS[key]) for key in USED}
    name = used["non_linearity"]
    if "version" not in record:
        name = RENAMED.get(name, name)
    if str(name).lower() not in ACTIVATIONS:
        raise ValueError(
            f"non_linearity={name!r} is not supported; {', '.join(map(repr, ACTIVATIONS))} are"
        )
    return AdapterHubConfig(
        reduction=used["reduction_factor"],
        activation=ACTIVATIONS[name.lower()],
        sees=_sees(used, post_norm),
        attention=bool(used["mh_adapter"]),
        feed_forward=bool(used["output_adapter"]),
        scaling=used["scaling"],
        dropout=used["dropout"],
        leave_out=list(used["leave_out"] or []),
    )


def _refuse_options(raw: dict[str, Any], record: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Refuse options that would change the outputs; those that change nothing pass."""
    nothing: tuple[Any, ...] = (None, False, 0, {}, [])
    options = [key for key in REFUSED if raw.get(key) not in nothing]
    options += [
        key
        for key in sorted(raw.keys() - DEFAULTS.keys() - set(FORGOTTEN))
        if raw[key] not in nothing
    ]
    # old files of task adapters name an invertible adapter that they do not have
    stale = record.get("type") == "text_task" and not any("invertible" in key for key in keys)
    options += [key for key in ("inv_adapter", "invertible_adapter") if raw.get(key) and not stale]
    if options:
        told = ", ".join(f"{key}={raw[key]!r}" for key in options)
        raise ValueError(f"options that are not supported here: {told}")


def _sees(used: Mapping[str, Any], post_norm: bool) -> str:
    """What the adapter sees, by the table at the top."""
    before, after = bool(used["original_ln_before"]), bool(used["original_ln_after"])
    residual = used["residual_before_ln"]
    if used["is_parallel"]:
        if after:
            return "residual"
    elif after and not before and residual != "post_add":
        return "output"
    elif after and before and residual is True:
        return "sum"
    elif before and not after and residual is False:
        return "normed" if post_norm else "sum"
    options = ", ".join(
        f"{key}={used[key]!r}"
        for key in ("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln")
    )
    raise ValueError(f"{options} together lose the layer's residual, or add it twice: refused")


def config_to(
    config: AdapterHubConfig | BottleneckConfig,
    parts: Mapping[tuple[int, bool], BottleneckAdapter],
    layers: Sequence[int],
) -> dict[str, Any]:
    """Translate a configuration into theirs, all options of it.

    Args:
        config: of the adapter.
        parts: its bottlenecks by (layer, whether in the attention sub-layer).
        layers: numbers of all layers of the model.

    Returns:
        What belongs under "config" in their adapter_config.json.

    Raises:
        ValueError: not the same in all layers that have one, or a width they have no number for.
    """
    where = {attention for _, attention in parts}
    out = [number for number in layers if not any((number, place) in parts for place in where)]
    for number in layers:
        if number not in out and not all((number, place) in parts for place in where):
            raise ValueError(
                f"layer {number} has an adapter in one of its sub-layers only, unlike others: "
                "AdapterHub's configuration cannot say so"
            )
    if isinstance(config, AdapterHubConfig):
        sees, dropout, reduction = config.sees, config.dropout, config.reduction
    else:
        sees = "residual" if config.placement == "parallel" else "output"
        dropout, reduction = 0.0, _reduction(config.reduction, parts.values())
    return DEFAULTS | {
        "dropout": dropout,
        "is_parallel": sees == "residual",
        "leave_out": out,
        "mh_adapter": True in where,
        "non_linearity": WRITTEN_AS.get(config.activation, config.activation),
        "original_ln_after": sees != "normed",
        "original_ln_before": sees in ("sum", "normed"),
        "output_adapter": False in where,
        "reduction_factor": reduction,
        "residual_before_ln": sees != "normed",
        # an integer is an error there
        "scaling": config.scaling if isinstance(config.scaling, str) else float(config.scaling),
    }


def _reduction(reduction: float, adapters: Iterable[BottleneckAdapter]) -> float:
    """A factor from which their rule, d // factor, makes the widths that the adapters have."""
    sizes = {(adapter.down.in_features, adapter.down.out_features) for adapter in adapters}
    for factor in (reduction, *(d / (m + 0.5) for d, m in sizes)):
        if all(int(d // float(factor)) == m for d, m in sizes):
            return float(factor)
    raise ValueError(f"no reduction factor of AdapterHub's gives the sizes {sorted(sizes)}")
