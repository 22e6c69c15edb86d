"""What both stacks are given: a model folder, batches, and a run's settings.

The weights are random (normal, deviation 0.02) and in bfloat16; the tokens are random too, since a
step takes as long whatever it learns. The first positions of each row are not graded, as a prompt
is not: `graded` is the share that is.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_core import LoRAConfig, add_adapter, load_model, save_adapter
from lora_core.checkpoint import save_model
from lora_core.models import CausalLM, ModelConfig
from lora_core.train.batches import make_batches

__all__ = ["SHAPES", "Settings", "adapter_folder", "batches", "write_model"]

_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    # Llama-3.2-1B's config.json with 4 of its 16 layers
    "1b-width": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_parameters": _ROPE,
        "tie_word_embeddings": True,
    },
    # Llama-3-8B's
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    },
    "smoke": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Settings:
    """One run; every figure is printed with these."""

    shape: str = "1b-width"
    """a name of SHAPES"""
    method: str = "qlora"
    """lora or qlora"""
    batch: int = 1
    """rows a step"""
    sequence: int = 128
    """tokens a row"""
    graded: float = 0.5
    """share of each row's tokens that is graded, at its end"""
    r: int = 16
    """rank; alpha is twice that, dropout is 0"""
    targets: str = "all-linear"
    """modules that are adapted"""
    optimizer: str = "adamw"
    """TrainConfig's; the other stack has torch's fused AdamW, or bitsandbytes' for adamw8bit"""
    checkpointing: bool = False
    """recompute layers in backward, in both stacks"""
    compile: bool = False
    """this library's layers compiled"""
    device: str = "cpu"
    """cpu or cuda"""
    steps: int = 8
    """steps that are run"""
    untimed: int = 2
    """of these, the first ones that are not timed"""
    lr: float = 1e-3
    """constant learning rate"""
    repeat: bool = False
    """the same batch at each step, which is then learnt by heart: for the check of the losses"""
    mixed: bool = False
    """rows of 1/8 to all of `sequence` tokens, padded, instead of all as long"""
    packing: int | None = None
    """tokens of the rows that mixed rows are packed into, one such row a step (this library)"""
    without: tuple[str, ...] = ()
    """savings of this library that are undone (plain.py)"""

    @property
    def tokens(self) -> int:
        """Tokens a step, where rows are equally long."""
        return self.batch * self.sequence

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Settings":
        """What `to_json` wrote."""
        fields = json.loads(text)
        return Settings(**fields | {"without": tuple(fields["without"])})


def write_model(shape: str, folder: Path, device: str = "cpu") -> None:
    """Write a Hugging Face folder of random weights, unless it is there already."""
    if (folder / "config.json").exists():
        return
    config = ModelConfig(bos_token_id=None, eos_token_id=None, **SHAPES[shape])
    with torch.device("meta"):
        model = CausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device=device)
    model.tie_weights()
    model.init_weights(0.02, torch.Generator(device).manual_seed(0))
    save_model(model, folder, dtype=torch.bfloat16)


def adapter_folder(settings: Settings, folder: Path) -> Path:
    """A new LoRA in PEFT's format, from which both stacks begin; made if it is not there."""
    path = folder / f"adapter-r{settings.r}"
    if not (path / "adapter_config.json").exists():
        model = load_model(folder)
        torch.manual_seed(1)
        add_adapter(model, LoRAConfig(r=settings.r, alpha=2 * settings.r, targets=settings.targets))
        save_adapter(model, path, base_model=str(folder))
    return path


def batches(settings: Settings) -> list[dict[str, Any]]:
    """The steps' batches: input_ids, labels and attention_mask, or a packed batch's tensors."""
    count = settings.batch * (1 if settings.repeat else settings.steps)
    rows = [_row(settings, number) for number in range(count)]
    packing = settings.packing
    source = make_batches(rows, 1 if packing else settings.batch, None, packing=packing)
    found = list(source.epoch(0))
    return (found * -(-settings.steps // len(found)))[: settings.steps]


def _row(settings: Settings, number: int) -> dict[str, list[int]]:
    """One sample: random ids, of which the last ones are graded."""
    generator = torch.Generator().manual_seed(number)
    length = settings.sequence
    if settings.mixed:
        length = int(torch.randint(length // 8, length + 1, (), generator=generator))
    words = SHAPES[settings.shape]["vocab_size"]
    ids = torch.randint(words, (length,), generator=generator).tolist()
    masked = round(length * (1 - settings.graded))
    return {"input_ids": ids, "labels": [-100] * masked + ids[masked:]}
