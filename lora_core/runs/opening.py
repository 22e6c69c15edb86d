"""Open a model as it was trained: its folder, its adapter, its precision, its template.

`finetune` leaves a `run.json` beside an adapter. It says which base the adapter belongs to, which
4-bit code that base was quantized with and in which template it learned to speak; the verbs that
use the adapter follow it, and say so where a flag goes against it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from lora_core.adapters import (
    BottleneckConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from lora_core.checkpoint import load_adapter, load_model
from lora_core.checkpoint.heads import HEADS, read_heads
from lora_core.checkpoint.safetensors_folder import read_json_object
from lora_core.data import (
    Tokenizer,
    check_vocabulary,
    load_template,
    load_tokenizer,
    missing_template_tokens,
)
from lora_core.device import default_device, resident_dtype
from lora_core.models import CausalLM, EncoderModel
from lora_core.objectives.score import has_score_head

RUN_FILE = "run.json"
ADAPTER_FILE = "adapter_config.json"
TEMPLATE_FILE = "chat_template.jinja"
AdapterConfig = LoRAConfig | BottleneckConfig | PromptTuningConfig | PrefixTuningConfig


@dataclasses.dataclass
class Opened:
    """A model ready to use, its tokenizer, and what the user should know about both."""

    model: CausalLM
    tok: Tokenizer
    source: Path
    """Folder of the base (or of the whole model)."""
    quantize: str | None
    """4-bit code of the base's linear layers; None: they are dense."""
    notes: list[str]
    """Lines to print."""


def device_named(name: str | None) -> torch.device:
    """The device of a `--device` flag; without one the accelerator, else the CPU.

    Raises:
        ValueError: no such device.
    """
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None
    if device.type == "meta":
        raise ValueError(f"--device {name} cannot be used: it has shapes, no numbers")
    return device


def read_run(directory: str | Path) -> dict[str, Any]:
    """The `run.json` of a folder that `finetune` made; {} where there is none.

    Raises:
        ValueError: it is not valid JSON.
    """
    file = Path(directory) / RUN_FILE
    if not file.is_file():
        return {}
    content = read_json_object(file)
    if "base" in content and not isinstance(content["base"], dict):
        raise ValueError(f"{file}: base must be a JSON object; got {content['base']!r}")
    return content


def _base_of(adapter: Path) -> Path:
    """The base model's folder that an adapter names."""
    file = adapter / ADAPTER_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter: {ADAPTER_FILE} is missing")
    named = read_json_object(file).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise ValueError(f"{file} names no base model: give --model")
    if not Path(named).is_dir():
        raise FileNotFoundError(f"the adapter's base {named!r} is no folder here: give --model")
    return Path(named)


def _is_quantized(source: Path) -> bool:
    """Whether a base's folder holds 4-bit weights already, as `lora-core quantize` writes it."""
    file = source / "config.json"
    return file.is_file() and read_json_object(file).get("quantization_config") is not None


def _template_of(adapter: Path | None, tok: Tokenizer, notes: list[str]) -> None:
    """Let the adapter's template take the base's place, and say so where they differ."""
    file = None if adapter is None else adapter / TEMPLATE_FILE
    if file is None or not file.is_file():
        return
    template = load_template(file)
    if tok.chat_template == template:
        return
    if tok.chat_template is not None:
        notes.append("the base's chat template differs; using the one saved with the adapter")
    tok.chat_template = template


def open_model(
    model: str | Path | None,
    adapter: str | Path | None = None,
    *,
    quantize: str | None = None,
    device: str | None = None,
    heads: bool = False,
) -> Opened:
    """Load a model and, if one is given, its adapter, as they were trained.

    Args:
        model: Hugging Face folder; None: the base that the adapter names.
        adapter: adapter folder; None: none.
        quantize: "nf4", "fp4", "int4", "none" (dense), or None: as the adapter's run.json says,
            dense where nothing says.
        device: None: the accelerator, else the CPU.
        heads: whether the caller puts the folder's heads on the model, so that no note says that
            they are left out.

    Returns:
        The model in eval mode, its adapter loaded and active but not trainable.

    Raises:
        ValueError: neither model nor adapter, or files that do not fit together.
        FileNotFoundError: a folder or file is missing.
    """
    if model is None and adapter is None:
        raise ValueError("give --model, --adapter, or both")
    refuse_reward_models(adapter)
    notes: list[str] = []
    where = None if adapter is None else Path(adapter)
    source = Path(model) if model is not None else _base_of(Path(str(adapter)))
    trained_on = {} if where is None else read_run(where).get("base", {})
    code = trained_on.get("quantize") if quantize is None else quantize
    code = None if code == "none" else code
    if where is not None and trained_on and code != trained_on.get("quantize"):
        notes.append(
            f"the adapter was trained on a {trained_on.get('quantize') or 'dense'} base; "
            f"this one is {code or 'dense'}"
        )
    if quantize is None and _is_quantized(source):
        code = None  # the folder's own 4 bits are read; nothing is quantized on top of them
    place = device_named(device)
    # added tokens come with the adapter's own tokenizer
    own = where is not None and (where / "tokenizer.json").is_file()
    tok = load_tokenizer(source)
    if own and where is not None:
        base, tok = tok, load_tokenizer(where)
        tok.stop_ids = tuple({*tok.stop_ids, *base.stop_ids})
    loaded = load_model(source, quantize=code, dtype=resident_dtype(place), device=place)
    _template_of(where, tok, notes)
    if own:
        grow_to(loaded, tok)
    notes += fit_notes(loaded.config.vocab_size, tok)
    if where is not None:
        load_adapter(loaded, where)
        if not heads and (told := heads_of(where)) is not None:
            notes.append(f"the heads in {where} are left out here: {told}")
    return Opened(loaded.eval(), tok, source, code, notes)


def check_writes_text(model: object, source: str | Path) -> None:
    """Refuse an encoder where text is to be written or graded word by word.

    Raises:
        ValueError: the model of the folder `source` is one.
    """
    if isinstance(model, EncoderModel):
        raise ValueError(
            f"{source} holds an encoder ({type(model).__name__}), which does not continue text: "
            "this command needs a decoder"
        )


def heads_of(directory: str | Path | None) -> str | None:
    """Which heads a folder holds, in words; None: it holds none.

    Raises:
        ValueError: its heads.json is damaged.
    """
    if directory is None or not (Path(directory) / HEADS).is_file():
        return None
    return ", ".join(f"{name} ({shape.kind})" for name, shape in read_heads(directory)[0].items())


def check_no_heads(*directories: str | Path | None) -> None:
    """Refuse folders whose training was for heads or scores, where text is written or graded.

    Raises:
        ValueError: one holds heads, or a reward model.
    """
    refuse_reward_models(*directories)
    for directory in directories:
        if (told := heads_of(directory)) is not None:
            raise ValueError(
                f"{directory} holds heads that label text and do not write it: {told}; use "
                f"`lora-core generate --adapter {directory} --label FILE.jsonl`, or "
                "lora_core.runs.open_heads"
            )


def refuse_reward_models(*directories: str | Path | None) -> None:
    """Refuse adapters that are reward models; ValueError says what they are for."""
    for directory in directories:
        if directory is not None and has_score_head(directory):
            raise ValueError(
                f"{directory} holds a reward model, which scores answers and writes none: give it "
                "to --reward"
            )


def fit_notes(rows: int, tok: Tokenizer) -> list[str]:
    """Lines on what does not fit between a model of so many embedding rows and its tokenizer.

    Raises:
        ValueError: the tokenizer gives ids that the model has no embedding for.
    """
    found = check_vocabulary(tok, rows)
    missing = missing_template_tokens(tok)
    notes = [] if found is None else [found]
    if missing:
        names = ", ".join(map(repr, missing))
        notes.append(f"the chat template writes {names}, not one token each in this tokenizer")
    return notes


def grow_to(model: CausalLM, tok: Tokenizer) -> bool:
    """Grow embedding and head to the tokenizer's size, where they are smaller; says whether."""
    from lora_core.adapters import grow_vocabulary

    if tok.vocab_size <= model.config.vocab_size:
        return False
    grow_vocabulary(model, tok.vocab_size)
    return True
