"""`lora-core finetune`: a Hugging Face folder and JSONL in, a trained and verified adapter out.

The verb is the library's parts in their order, and nothing else: read the tokenizer and the data,
load the base (quantized as it streams for `qlora`), attach the adapter, train, save, read the saved
adapter back and compare it with the one in memory. `run.json` holds every setting with the hashes
of what went in, so `--config run.json` repeats the run.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    add_adapter,
    grow_vocabulary,
)
from lora_core.checkpoint import adapter_state_dict, load_model, save_adapter, save_model
from lora_core.checkpoint.peft import read_adapter
from lora_core.checkpoint.safetensors_folder import read_json_object
from lora_core.cli.flags import add_dataclass_flags, given
from lora_core.cli.opening import (
    ADAPTER_FILE,
    TEMPLATE_FILE,
    AdapterConfig,
    device_named,
    read_run,
    resident_dtype,
)
from lora_core.data import (
    Record,
    SFTDataset,
    Tokenizer,
    load_template,
    load_tokenizer,
    parse_columns,
    parse_sources,
    split,
)
from lora_core.files import atomic_write, sha256_file
from lora_core.models import CausalLM
from lora_core.train import DEFAULT_LR, TrainConfig, TrainResult, train

HELP = "train an adapter (or a whole model) on JSONL conversations"
EXAMPLE = "lora-core finetune --model DIR --data chats.jsonl --out runs/mine --method qlora --r 16"

METHODS = ("lora", "qlora", "full", "bottleneck", "prompt", "prefix")
KINDS: dict[str, Callable[..., AdapterConfig] | None] = {
    "full": None,
    "bottleneck": BottleneckConfig,
    "prompt": PromptTuningConfig,
    "prefix": PrefixTuningConfig,
}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What is trained, on what: the edge between the command line and the library."""

    model: str
    """Hugging Face folder of the base model."""
    data: tuple[str, ...]
    """JSONL files, each optionally with :weight."""
    out: str
    """Folder that gets the adapter (or the model), metrics, plot and run.json."""
    method: Literal["lora", "qlora", "full", "bottleneck", "prompt", "prefix"] = "lora"
    """What is trained: LoRA, LoRA on a 4-bit base, every weight, bottlenecks, or soft prompts."""
    quantize: Literal["nf4", "fp4", "int4"] = "nf4"
    """4-bit code of the base, for qlora."""
    eval_data: str | None = None
    """JSONL file to evaluate on; none: eval_fraction of the data."""
    eval_fraction: float = 0.05
    """Share of the rows that is set aside for evaluation; 0: no evaluation."""
    template: str | None = None
    """Chat template: a built-in name, a file, or Jinja text; none: the tokenizer's own."""
    columns: str | None = None
    """Names of the data's fields: prompt=question,completion=answer."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which turns are graded: the assistant's, its last one, or everything."""
    max_length: int = 2048
    """Longest row, in tokens."""
    control_text: Literal["drop", "keep"] = "drop"
    """A message that spells a control token: drop its row, counted, or keep it as that token."""
    add_tokens: str | None = None
    """Tokens to add to the vocabulary, separated by commas; their rows are trained and saved."""
    device: str | None = None
    """cpu, cuda, cuda:1 …; none: the accelerator, else the CPU."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("no data: give --data FILE.jsonl (more than one is mixed by weight)")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in [0, 1); got {self.eval_fraction}")


@dataclass
class Finetuned:
    """What a run leaves in memory."""

    model: CausalLM
    tok: Tokenizer
    result: TrainResult
    report: str
    """What was attached: sites, trainable parameters and their share."""


def records_bar(records: Iterable[Record]) -> Iterable[Record]:
    """A progress bar over records as they are read; silent where reading takes no time."""
    from tqdm import tqdm

    return tqdm(records, unit=" records", desc="reading", delay=1, leave=False)


def read_data(
    config: FinetuneConfig, tok: Tokenizer, seed: int
) -> tuple[Sequence[Any], Sequence[Any] | None, list[str]]:
    """Rows to train on, rows to evaluate on, and the lines that say what was read."""

    def read(paths: list[tuple[str, float]]) -> SFTDataset:
        return SFTDataset.from_jsonl(
            paths,
            tok,
            template=config.template,
            max_length=config.max_length,
            columns=None if config.columns is None else parse_columns(config.columns),
            train_on=config.train_on,
            seed=seed,
            control_text=config.control_text,
            progress=records_bar,
        )

    rows = read(parse_sources(config.data))
    lines = [f"data: {rows.report}"]
    if config.eval_data is not None:
        held_out = read([(config.eval_data, 1.0)])
        return rows, held_out, [*lines, f"evaluation data: {held_out.report}"]
    if config.eval_fraction == 0 or len(rows) < 2:
        return rows, None, [*lines, "no evaluation: no rows are set aside"]
    kept, aside = split(rows, config.eval_fraction, seed)
    return kept, aside, [*lines, f"{len(kept)} rows to train on, {len(aside)} to evaluate on"]


def attach(
    model: nn.Module, method: str, config: AdapterConfig | None, new_ids: Sequence[int] = ()
) -> str:
    """Make the method's parameters trainable and the rest frozen; say what that is.

    Args:
        model: the base.
        method: one of METHODS, for messages.
        config: the adapter; None trains every weight.
        new_ids: rows of the embedding that were just added, to be trained.

    Raises:
        ValueError: added tokens with a method that has no trainable rows.
    """
    if config is None:
        model.requires_grad_(True)
        count = sum(p.numel() for p in model.parameters())
        return f"every weight is trained: {count:,} parameters"
    if new_ids:
        if not isinstance(config, LoRAConfig):
            raise ValueError(f"--add-tokens trains rows with lora, qlora or full, not {method}")
        config = dataclasses.replace(config, trainable_token_indices=list(new_ids))
    return str(add_adapter(model, config))


def provenance(config: FinetuneConfig, tok: Tokenizer) -> dict[str, Any]:
    """Hashes of what goes into a run: data, model and template."""
    import hashlib

    weights = sorted(Path(config.model).glob("*.safetensors"))
    paths = [path for path, _ in parse_sources(config.data)]
    paths += [config.eval_data] if config.eval_data else []
    template = (tok.chat_template or "").encode()
    return {
        "data": {path: sha256_file(path) for path in paths},
        "model": {path.name: sha256_file(path) for path in weights},
        "template": hashlib.sha256(template).hexdigest(),
    }


def finetune(
    config: FinetuneConfig, adapter: AdapterConfig | None, training: TrainConfig
) -> Finetuned:
    """Run the whole path and leave the files in `config.out`.

    Args:
        config: model, data, method.
        adapter: the method's configuration; None for full.
        training: the loop's settings; its `out` is `config.out`.

    Returns:
        The trained model and what is known of the run.

    Raises:
        ValueError: bad settings, bad data, or an adapter that does not read back as it was saved.
        FileNotFoundError: a folder or file is missing.
    """
    out = Path(config.out)
    if not training.resume and (out / "run.json").exists():
        raise ValueError(f"{out} holds a run: --resume continues it, or choose another --out")
    tok = load_tokenizer(config.model)
    if config.template is not None:
        tok.chat_template = load_template(config.template)
    new_ids = tok.add_tokens(config.add_tokens.split(",")) if config.add_tokens else []
    rows, held_out, lines = read_data(config, tok, training.seed)
    for line in lines:
        _say(line)
    device = device_named(config.device)
    code = config.quantize if config.method == "qlora" else None
    # a whole model is trained in float32: small steps would round away in 16 bits
    dtype = torch.float32 if config.method == "full" else resident_dtype(device)
    torch.manual_seed(training.seed)  # the adapter's start
    model = load_model(config.model, quantize=code, dtype=dtype, device=device)
    if new_ids:
        grow_vocabulary(model, tok.vocab_size)
    report = attach(model, config.method, _with_tokens(adapter, tok), new_ids)
    _say(report)
    _say(f"learning rate {training.lr:g} ({config.method})")
    facts = {
        "finetune": dataclasses.asdict(config),
        "adapter": None if adapter is None else adapter_settings(adapter),
        "base": {"model": str(Path(config.model).resolve()), "quantize": code},
        "sha256": provenance(config, tok),
    }
    result = train(model, rows, training, eval_dataset=held_out, facts=facts)
    finished_before = result.resumed_from == result.steps and is_complete(out)
    if not finished_before:
        leave(out, model, tok, config, bool(new_ids))
    return Finetuned(model, tok, result, report)


def _with_tokens(adapter: AdapterConfig | None, tok: Tokenizer) -> AdapterConfig | None:
    """The configuration with a prompt's text as token ids, which are not recorded."""
    if isinstance(adapter, PromptTuningConfig) and adapter.text is not None:
        return dataclasses.replace(adapter, tokenizer=tok)
    return adapter


def is_complete(out: Path) -> bool:
    """Whether a run's folder already holds what the run was for."""
    return any((out / name).exists() for name in (ADAPTER_FILE, "config.json"))


def adapter_settings(config: AdapterConfig) -> dict[str, Any]:
    """An adapter's fields as JSON holds them."""
    return {k: v for k, v in dataclasses.asdict(config).items() if not callable(v)}


def leave(out: Path, model: CausalLM, tok: Tokenizer, config: FinetuneConfig, grown: bool) -> None:
    """Write the adapter (or the model), its template, and read the adapter back."""
    if config.method == "full":
        save_model(model, out, source=config.model, dtype=None)
        tok.save(out)
        return
    save_adapter(model, out, base_model=str(Path(config.model).resolve()))
    if tok.chat_template is not None:
        atomic_write(out / TEMPLATE_FILE, tok.chat_template)
    if grown:
        tok.save(out)
    verify_saved(model, out)


def verify_saved(model: nn.Module, directory: Path) -> None:
    """Compare the adapter on disk with the one in memory, bit for bit.

    Raises:
        ValueError: they differ.
    """
    held, saved = adapter_state_dict(model), read_adapter(directory)[1]
    for key in sorted(held.keys() | saved.keys()):
        if key not in saved or key not in held or not torch.equal(held[key].cpu(), saved[key]):
            raise ValueError(f"{directory}: {key} reads back differently: the disk may be failing")
    _say(f"saved and read back: {len(saved)} tensors in {directory}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


# --- the command line ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags: one for each field of the four dataclasses."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE[:WEIGHT]",
        dest="FinetuneConfig.data",
        default=argparse.SUPPRESS,
        help="JSONL files, mixed by weight",
    )
    add_dataclass_flags(parser, FinetuneConfig, skip=("data",), title="model and data")
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
    parser.add_argument("--config", metavar="run.json", help="repeat a run; flags override it")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


_UNFLAGGED = ("trainable_token_indices", "rank_pattern", "alpha_pattern")


def _list(value: Any) -> Any:
    """`q_proj,v_proj` to a list; "all-linear" and regular expressions stay strings."""
    if isinstance(value, str) and "," in value and not set(value) & set("()[]|*+?^$\\"):
        return [part.strip() for part in value.split(",")]
    return value


def settings(args: argparse.Namespace) -> tuple[FinetuneConfig, AdapterConfig | None, TrainConfig]:
    """The three configurations, from `--config` and the flags over it."""
    run = _read_config(args.config)
    wanted = {**run.get("finetune", {}), **given(args, FinetuneConfig)}
    for key in ("model", "out"):
        if not wanted.get(key):
            raise ValueError(f"--{key} is missing")
    config = FinetuneConfig(**{**wanted, "data": tuple(wanted.get("data", ()))})
    kind = KINDS.get(config.method, LoRAConfig)
    adapter: AdapterConfig | None = None
    if kind is not None:
        same = run.get("finetune", {}).get("method") in (None, config.method)
        fields = {**((run.get("adapter") or {}) if same else {}), **_given(args, kind)}
        adapter = kind(**{k: v if k == "text" else _list(v) for k, v in fields.items()})
    if config.method == "qlora" and getattr(adapter, "init", None) == "loftq":
        raise ValueError(
            "--init loftq quantizes the 16-bit base itself, and --method qlora has it quantized "
            "already: use --method lora, which trains on the 4-bit base that LoftQ makes"
        )
    training = {"lr": DEFAULT_LR[config.method], **run.get("train", {}), **given(args, TrainConfig)}
    # whether to go on is this call's question, not the recorded run's
    training["resume"] = given(args, TrainConfig).get("resume", False)
    return config, adapter, TrainConfig(**{**training, "out": config.out})


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
            _say(f"note: {name} has changed since that run")
    return run


def run(args: argparse.Namespace) -> int:
    """Train, and say where the result lies."""
    config, adapter, training = settings(args)
    done = finetune(config, adapter, training)
    last = done.result.history[-1] if done.result.history else {}
    facts = {
        "out": config.out,
        "method": config.method,
        "steps": done.result.steps,
        "tokens": done.result.tokens,
        "loss": last.get("loss"),
        "best_eval_loss": done.result.best_loss,
        "tokens_per_second": done.result.tokens_per_second,
        "peak_memory": done.result.peak_memory,
        "interrupted": done.result.interrupted,
    }
    if args.json:
        print(json.dumps(facts))
    else:
        print(f"{config.method}: {done.result.steps} steps; the result is in {config.out}")
        if config.method != "full":
            print(f"  try:   lora-core generate --adapter {config.out} --prompt '…'")
        if config.method in ("lora", "qlora"):
            print(f"  merge: lora-core merge --adapter {config.out} --out {config.out}-merged")
    return 130 if done.result.interrupted else 0
