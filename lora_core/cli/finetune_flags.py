"""The settings of `lora-core finetune`: a flag for each field of the dataclasses, over `--config`.

A flag that was given wins over the recorded run, and that over the field's default.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from lora_core.checkpoint.safetensors_folder import read_json_object
from lora_core.cli.flags import add_dataclass_flags, given
from lora_core.files import sha256_file
from lora_core.objectives import OBJECTIVES
from lora_core.runs import AdapterConfig, FinetuneConfig, read_run
from lora_core.runs.finetune import KINDS
from lora_core.train import DEFAULT_LR, TrainConfig
from lora_core.train.report import say

OPTION_FLAGS: dict[str, dict[str, str]] = {}
"""options class -> field -> flag, where the command line's word differs"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags: one for each field of the dataclasses."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE[:WEIGHT]",
        dest="FinetuneConfig.data",
        default=argparse.SUPPRESS,
        help="JSONL files, mixed by weight",
    )
    parser.add_argument(
        "--objective",
        choices=list(OBJECTIVES),
        dest="FinetuneConfig.objective",
        default=argparse.SUPPRESS,
        help="; ".join(f"{name}: {kind.help}" for name, kind in OBJECTIVES.items()),
    )
    add_dataclass_flags(parser, FinetuneConfig, skip=("data", "objective"), title="model and data")
    add_dataclass_flags(parser, LoRAConfig, skip=_UNFLAGGED, title="LoRA (lora, qlora)")
    parser.add_argument(
        "--modules-to-save",
        metavar="NAME,NAME",
        type=lambda text: [name.strip() for name in text.split(",")],
        dest="LoRAConfig.modules_to_save",
        default=argparse.SUPPRESS,
        help="modules to train whole beside the LoRA, by name or suffix",
    )
    add_dataclass_flags(
        parser, BottleneckConfig, skip=("targets", "exclude", "dropout"), title="bottleneck"
    )
    words = {"init": "prompt-init", "text": "prompt-text", "vocabulary": "prompt-vocabulary"}
    add_dataclass_flags(parser, PromptTuningConfig, rename=words, title="soft prompts (prompt)")
    words = {name: f"prefix-{name}" for name in ("projection", "hidden", "init", "std")}
    title = "soft prompts (prefix; its length is --num-virtual-tokens)"
    add_dataclass_flags(
        parser, PrefixTuningConfig, skip=("num_virtual_tokens",), rename=words, title=title
    )
    rates = ", ".join(f"{method} {rate:g}" for method, rate in DEFAULT_LR.items())
    add_dataclass_flags(
        parser, TrainConfig, skip=("out",), title="training", defaults={"lr": f"by method: {rates}"}
    )
    kinds: dict[type, list[str]] = {}
    for name, objective in OBJECTIVES.items():
        for options in _family(objective.options_class):
            kinds.setdefault(options, []).append(name)
    for options, names in kinds.items():
        words = OPTION_FLAGS.get(options.__name__, {})
        title = f"objective {', '.join(names)}"
        extended = _family(options)[1:]
        theirs = [field.name for other in extended for field in dataclasses.fields(other)]
        add_dataclass_flags(parser, options, skip=theirs, rename=words, title=title)
    parser.add_argument("--config", metavar="run.json", help="repeat a run; flags override it")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


_UNFLAGGED = ("trainable_token_indices", "rank_pattern", "alpha_pattern")


def _list(value: Any) -> Any:
    """`q_proj,v_proj` to a list; "all-linear" and regular expressions stay strings."""
    if isinstance(value, str) and "," in value and not set(value) & set("()[]|*+?^$\\"):
        return [part.strip() for part in value.split(",")]
    return value


@dataclass(frozen=True)
class Settings:
    """All that the flags say."""

    config: FinetuneConfig
    adapter: AdapterConfig | None
    """None: every weight is trained, or an adapter is gone on with"""
    training: TrainConfig
    options: Any
    """of the objective"""


def settings(args: argparse.Namespace) -> Settings:
    """The configurations, from `--config` and the flags over it."""
    run = _read_config(args.config)
    out = run.get("train", {}).get("out")
    wanted = {"out": out, **run.get("finetune", {}), **given(args, FinetuneConfig)}
    for key in ("model", "out"):
        if not wanted.get(key):
            raise ValueError(f"--{key} is missing")
    config = FinetuneConfig(**{**wanted, "data": tuple(wanted.get("data", ()))})
    kind = KINDS.get(config.method, LoRAConfig)
    adapter: AdapterConfig | None = None
    if kind is not None and config.adapter is not None and (stray := _given(args, kind)):
        raise ValueError(
            f"--{next(iter(stray)).replace('_', '-')} is the shape of a fresh adapter: leave it "
            "out, or leave out --adapter"
        )
    if kind is not None and config.adapter is None:
        same = run.get("finetune", {}).get("method") in (None, config.method)
        fields = {**((run.get("adapter") or {}) if same else {}), **_given(args, kind)}
        adapter = kind(**{k: v if k == "text" else _list(v) for k, v in fields.items()})
    if config.method == "qlora" and getattr(adapter, "init", None) == "loftq":
        raise ValueError(
            "--init loftq quantizes the 16-bit base itself, and --method qlora has it quantized "
            "already: use --method lora, which trains on the 4-bit base that LoftQ makes"
        )
    objective = OBJECTIVES[config.objective]
    rates = DEFAULT_LR | dict(objective.rates)
    training = {"lr": rates[config.method], **objective.training}
    training |= {**run.get("train", {}), **given(args, TrainConfig)}
    # whether to go on is this call's question, not the recorded run's
    training["resume"] = given(args, TrainConfig).get("resume", False)
    whole = TrainConfig(**{**training, "out": config.out})
    return Settings(config, adapter, whole, _options(args, config, run))


def _options(args: argparse.Namespace, config: FinetuneConfig, run: dict[str, Any]) -> Any:
    """The objective's options; a flag of another objective's is refused, as it would do nothing."""
    kind = OBJECTIVES[config.objective].options_class
    family = _family(kind)
    others = {o.options_class for o in OBJECTIVES.values()} - set(family)
    for other in sorted(others, key=lambda cls: cls.__name__):
        if stray := given(args, other):
            flag = OPTION_FLAGS.get(other.__name__, {}).get(next(iter(stray)), next(iter(stray)))
            raise ValueError(f"--{flag.replace('_', '-')} is no option of {config.objective}")
    same = run.get("finetune", {}).get("objective", "sft") == config.objective
    fields = dict((run.get("objective") or {}) if same else {})
    for each in family:
        fields |= given(args, each)
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in fields.items() if name in known})


def _family(kind: type) -> list[type]:
    """An objective's options, and the objectives' options that they extend: these share flags."""
    every = {objective.options_class for objective in OBJECTIVES.values()}
    return [cls for cls in kind.__mro__ if cls in every and dataclasses.fields(cls)]


def _given(args: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """An adapter's flags; the two kinds of soft prompt share --num-virtual-tokens."""
    flags = given(args, kind)
    if kind is PrefixTuningConfig:
        shared = given(args, PromptTuningConfig)
        flags |= {k: v for k, v in shared.items() if k == "num_virtual_tokens"}
    return flags


def _read_config(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--config {path}: no such file")
    run = read_run(file.parent) if file.name == "run.json" else read_json_object(file)
    recorded = run.get("sha256", {}).get("data", {})
    for name, digest in recorded.items():
        if not Path(name).is_file():
            raise FileNotFoundError(f"{path} names the data file {name}, which is not there")
        if sha256_file(name) != digest:
            say(f"note: {name} has changed since that run")
    return run
