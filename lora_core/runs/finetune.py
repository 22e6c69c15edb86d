"""Fine-tune from folder to folder: a Hugging Face model and JSONL in, a verified adapter out.

The library's parts in their order, and nothing else: read the tokenizer and the data, load the base
(quantized as it streams for `qlora`), attach the adapter or go on with one, train, save, read the
saved adapter back and compare it with the one in memory. What the run trains for (its data, its
loss, its batches) is its objective's (lora_core/objectives). `run.json` holds every setting with
the hashes of what went in.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
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
from lora_core.checkpoint import (
    adapter_state_dict,
    load_model,
    save_adapter,
)
from lora_core.checkpoint.peft import read_adapter
from lora_core.data import Tokenizer, load_template, load_tokenizer, parse_sources
from lora_core.device import resident_dtype
from lora_core.files import atomic_write, sha256_file
from lora_core.models import CausalLM
from lora_core.objectives import OBJECTIVES, DataSettings, Objective, Setup
from lora_core.runs.opening import (
    TEMPLATE_FILE,
    AdapterConfig,
    check_writes_text,
    device_named,
    fit_notes,
    grow_to,
    read_run,
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
class FinetuneConfig(DataSettings):
    """What is trained, on what: the edge between the command line and the library."""

    out: str
    """Folder that gets the adapter (or the model), metrics, plot and run.json."""
    objective: str = "sft"
    """What is trained for; see OBJECTIVES."""
    method: Literal["lora", "qlora", "full", "bottleneck", "prompt", "prefix"] = "lora"
    """What is trained: LoRA, LoRA on a 4-bit base, every weight, bottlenecks, or soft prompts."""
    adapter: str | None = None
    """Folder of an adapter to go on training, in place of a fresh one."""
    quantize: Literal["nf4", "fp4", "int4"] = "nf4"
    """4-bit code of the base, for qlora."""
    add_tokens: str | None = None
    """Tokens to add to the vocabulary, separated by commas; their rows are trained and saved."""
    device: str | None = None
    """cpu, cuda, cuda:1 …; none: the accelerator, else the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective must be one of {', '.join(OBJECTIVES)}; got {self.objective!r}"
            )
        if self.adapter is not None and self.method == "full":
            raise ValueError("an adapter cannot be gone on with by method full: leave one out")
        if self.adapter is not None and self.add_tokens is not None:
            raise ValueError("added tokens are trained by a fresh adapter: leave out adapter")


@dataclass
class Finetuned:
    """What a run leaves in memory."""

    model: Any
    """a decoder, or what the objective trains instead"""
    tok: Tokenizer
    result: TrainResult
    report: str
    """What was attached: sites, trainable parameters and their share."""


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


def go_on(setup: Setup, part: nn.Module, objective: Objective[Any]) -> str:
    """Load the adapter that training goes on with; say what it is."""
    assert setup.continued is not None  # asked only where there is one
    recorded = read_run(setup.continued).get("base", {})
    said = f"going on with {setup.continued}: {objective.go_on(setup, part)}"
    if recorded and recorded.get("quantize") != setup.quantize:
        before, now = recorded.get("quantize") or "dense", setup.quantize or "dense"
        said += f"\nnote: it was trained on a {before} base; this one is {now}"
    return said


def finetune(
    config: FinetuneConfig,
    adapter: AdapterConfig | None,
    training: TrainConfig,
    options: Any = None,
) -> Finetuned:
    """Run the whole path and leave the files in `config.out`.

    Args:
        config: model, data, method.
        adapter: the method's configuration; None for full, and where `config.adapter` is given.
        training: the loop's settings; its `out` is `config.out`.
        options: of the objective, an instance of its `options_class`; None: the defaults.

    Returns:
        The trained model and what is known of the run.

    Raises:
        ValueError: bad settings, bad data, or an adapter that does not read back as it was saved.
        FileNotFoundError: a folder or file is missing.
    """
    with joined_ranks() as ranks:
        kind = OBJECTIVES[config.objective]
        objective = kind(kind.options_class() if options is None else options)
        return _finetune(config, adapter, training, objective, ranks)


def _finetune(
    config: FinetuneConfig,
    adapter: AdapterConfig | None,
    training: TrainConfig,
    objective: Objective[Any],
    ranks: Ranks,
) -> Finetuned:
    out = Path(config.out)
    if not training.resume and (out / "run.json").exists():
        raise ValueError(f"{out} holds a run: --resume continues it, or choose another --out")
    tok = load_tokenizer(config.model)
    if config.template is not None:
        tok.chat_template = load_template(config.template)
    new_ids = tok.add_tokens(config.add_tokens.split(",")) if config.add_tokens else []
    code = config.quantize if config.method == "qlora" else None
    setup = Setup(
        settings=config,
        training=training,
        method=config.method,
        tok=tok,
        device=local_device(device_named(config.device)),
        out=out,
        quantize=code,
        continued=None if config.adapter is None else Path(config.adapter),
        say=ranks.say,
        show=ranks.first,
    )
    objective.check(setup)
    objective.read(setup)
    model, report = opened(setup, objective, adapter, new_ids)
    ranks.say(report)
    work = objective.prepare(setup, model)
    ranks.say(f"learning rate {training.lr:g} ({config.method}, {config.objective})")
    recorded = dataclasses.asdict(config)
    del recorded["out"]  # training's; a run may go on in a folder that was moved
    facts = {
        "finetune": recorded,
        "objective": objective.facts(),
        "adapter": None if adapter is None else adapter_settings(adapter),
        "base": {"model": str(Path(config.model).resolve()), "quantize": code},
        "sha256": provenance(config, tok),
        **work.facts,
    }
    result = train(
        model,
        work.dataset,
        training,
        eval_dataset=work.eval_dataset,
        loss=work.loss,
        optimizer=work.optimizer,
        collate=work.collate,
        facts=facts,
        device=setup.device,
        surgery=work.surgery,
    )
    for line in objective.report(result):
        ranks.say(line)

    def keep() -> None:
        mark, state = out / SAVED_FILE, state_of(result, training.keep_best)
        if mark.is_file() and mark.read_text() == state:
            return  # a finished run that was resumed
        try:
            leave(setup, model, objective, bool(new_ids))
            atomic_write(mark, state)  # last: a kill before it has all saved again
        except OSError as error:
            raise OSError(f"{error}; training is done, and --resume saves the result") from error

    ranks.on_first(keep)
    return Finetuned(model, tok, result, report)


def opened(
    setup: Setup, objective: Objective[Any], adapter: AdapterConfig | None, new_ids: Sequence[int]
) -> tuple[Any, str]:
    """The model with what is to be trained attached, and a line that says what that is."""
    torch.manual_seed(setup.training.seed)  # the adapter's start
    model: Any = objective.load(setup, lambda: load_base(setup))
    if objective.needs_decoder:
        check_writes_text(model, setup.settings.model)
    if new_ids:
        grow_to(model, setup.tok)  # an embedding padded to a round number may have room
    for note in fit_notes(model.config.vocab_size, setup.tok):
        setup.say(f"note: {note}")
    if setup.continued is not None:
        return model, go_on(setup, objective.adapted(model), objective)
    wanted = objective.adapt(_with_tokens(adapter, setup.tok))
    return model, attach(objective.adapted(model), setup.method, wanted, new_ids)


def load_base(setup: Setup) -> CausalLM:
    """The base as it is trained on: quantized for qlora, where the device computes."""
    # a whole model is trained in float32: small steps would round away in 16 bits
    dtype = torch.float32 if setup.method == "full" else resident_dtype(setup.device)
    # what is to be split need not fit into one device
    home = torch.device("cpu") if setup.training.shard else setup.device
    return load_model(setup.settings.model, quantize=setup.quantize, dtype=dtype, device=home)


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


def leave(setup: Setup, model: nn.Module, objective: Objective[Any], grown: bool) -> None:
    """Write the adapter (or the model) and what belongs to it; read the adapter back."""
    out, tok = setup.out, setup.tok
    if setup.method == "full":
        objective.save_model(setup, model)
        tok.save(out)
        return
    adapted = objective.adapted(model)
    save_adapter(adapted, out, base_model=str(Path(setup.settings.model).resolve()))
    if tok.chat_template is not None:
        atomic_write(out / TEMPLATE_FILE, tok.chat_template)
    if grown:
        tok.save(out)
    objective.save(setup, model)
    verify_saved(adapted, out)


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
