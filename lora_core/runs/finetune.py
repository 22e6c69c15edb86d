"""Fine-tune from folder to folder: a Hugging Face model and JSONL in, a verified adapter out.

The library's parts in their order, and nothing else: read the tokenizer and the data, load the base
(quantized as it streams for `qlora`), attach the adapter, train, save, read the saved adapter back
and compare it with the one in memory. `run.json` holds every setting with the hashes of what went
in.
"""

import dataclasses
import json
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
)
from lora_core.checkpoint import adapter_state_dict, load_model, save_adapter, save_model
from lora_core.checkpoint.peft import read_adapter
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
from lora_core.runs.opening import (
    TEMPLATE_FILE,
    AdapterConfig,
    check_writes_text,
    device_named,
    fit_notes,
    grow_to,
    resident_dtype,
)
from lora_core.train import TrainConfig, TrainResult, train
from lora_core.train.ranks import Ranks, joined_ranks, local_device
from lora_core.train.report import say

SAVED_FILE = ".saved"
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
    config: FinetuneConfig, tok: Tokenizer, seed: int, show: bool = True
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
            progress=records_bar if show else None,
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
    with joined_ranks() as ranks:
        return _finetune(config, adapter, training, ranks)


def _finetune(
    config: FinetuneConfig, adapter: AdapterConfig | None, training: TrainConfig, ranks: Ranks
) -> Finetuned:
    out = Path(config.out)
    if not training.resume and (out / "run.json").exists():
        raise ValueError(f"{out} holds a run: --resume continues it, or choose another --out")
    tok = load_tokenizer(config.model)
    if config.template is not None:
        tok.chat_template = load_template(config.template)
    new_ids = tok.add_tokens(config.add_tokens.split(",")) if config.add_tokens else []
    rows, held_out, lines = read_data(config, tok, training.seed, ranks.first)
    for line in lines:
        ranks.say(line)
    device = local_device(device_named(config.device))
    code = config.quantize if config.method == "qlora" else None
    # a whole model is trained in float32: small steps would round away in 16 bits
    dtype = torch.float32 if config.method == "full" else resident_dtype(device)
    torch.manual_seed(training.seed)  # the adapter's start
    # what is to be split need not fit into one device
    home = torch.device("cpu") if training.shard else device
    model = load_model(config.model, quantize=code, dtype=dtype, device=home)
    check_writes_text(model, config.model)
    if new_ids:
        grow_to(model, tok)  # an embedding padded to a round number may have room
    for note in fit_notes(model.config.vocab_size, tok):
        ranks.say(f"note: {note}")
    report = attach(model, config.method, _with_tokens(adapter, tok), new_ids)
    ranks.say(report)
    ranks.say(f"learning rate {training.lr:g} ({config.method})")
    recorded = dataclasses.asdict(config)
    del recorded["out"]  # training's; a run may go on in a folder that was moved
    facts = {
        "finetune": recorded,
        "adapter": None if adapter is None else adapter_settings(adapter),
        "base": {"model": str(Path(config.model).resolve()), "quantize": code},
        "sha256": provenance(config, tok),
    }
    result = train(model, rows, training, eval_dataset=held_out, facts=facts, device=device)

    def keep() -> None:
        mark, state = out / SAVED_FILE, state_of(result, training.keep_best)
        if mark.is_file() and mark.read_text() == state:
            return  # a finished run that was resumed
        try:
            leave(out, model, tok, config, bool(new_ids))
            atomic_write(mark, state)  # last: a kill before it has all saved again
        except OSError as error:
            raise OSError(f"{error}; training is done, and --resume saves the result") from error

    ranks.on_first(keep)
    return Finetuned(model, tok, result, report)


def _with_tokens(adapter: AdapterConfig | None, tok: Tokenizer) -> AdapterConfig | None:
    """The configuration with a prompt's text as token ids, which are not recorded."""
    if isinstance(adapter, PromptTuningConfig) and adapter.text is not None:
        return dataclasses.replace(adapter, tokenizer=tok)
    return adapter


def state_of(result: TrainResult, keep_best: bool) -> str:
    """Which weights a run's result is, as its folder records what was saved.

    The last step's record has its times, so no two runs have the same, however alike they are.
    """
    which = {"best": result.best_step if keep_best and not result.interrupted else None}
    return json.dumps(which | {"last": result.history[-1:]}) + "\n"


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
    say(f"saved and read back: {len(saved)} tensors in {directory}")
