"""Folders of random weights for `benchmarks.loading`, and what is checked before a load is timed.

A folder is written one tensor at a time, so that 16 GB of weights need the memory of the largest.
The values are normal (deviation 0.02), cut from one block of random numbers at offsets that differ
from tensor to tensor and from piece to piece: a byte costs a copy, not a draw, and no two rows of a
weight are alike in practice.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_core.checkpoint import load_model, load_state
from lora_core.checkpoint.safetensors_writing import Pending
from lora_core.checkpoint.saving import write_weights
from lora_core.models import CausalLM, ModelConfig
from lora_core.plan import model_named
from lora_core.quant import NF4Linear, quantize_nf4

BLOCK = 4_194_301  # prime: rows of no width begin at the same place twice
CHECKED_VOCABULARY = 1024
PROCESS_BYTES = 10**9  # Python, torch and transformers; and some room
Load = Callable[..., nn.Module]


def shape_of(text: str, vocab: int) -> ModelConfig:
    """The sizes that are meant: "1b" or "8b" (lora_core/plan/models.json), or "hidden,layers".

    Raises:
        ValueError: neither.
    """
    hidden, _, layers = text.partition(",")
    if not (hidden.isdigit() and layers.isdigit()):
        return dataclasses.replace(model_named(text), bos_token_id=None, eos_token_id=None)
    width = int(hidden)
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width * 7 // 2 // 64 * 64,
        num_hidden_layers=int(layers),
        num_attention_heads=max(width // 128, 1),
        num_key_value_heads=max(width // 512, 1),
        bos_token_id=None,
        eos_token_id=None,
    )


def parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights, a tied head once."""
    with torch.device("meta"):
        model = CausalLM(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def write_folder(folder: Path, config: ModelConfig, dtype: str, shards: int = 4) -> None:
    """Write a model of random weights, one tensor in memory at a time."""
    kind = getattr(torch, dtype)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(kind)
    block = torch.cat([block, block])  # a piece may begin anywhere
    tensors = [
        Pending(name, shape, kind, _maker(block, shape, seed))
        for seed, (name, shape) in enumerate(parameters(config).items(), 1)
    ]
    write_weights(folder, tensors, -(-sum(item.nbytes for item in tensors) // shards))
    text = json.dumps(dataclasses.replace(config, dtype=dtype).to_dict())
    (folder / "config.json").write_text(text, encoding="utf-8")


def _maker(block: Tensor, shape: tuple[int, ...], seed: int) -> Callable[[], Tensor]:
    def make() -> Tensor:
        if len(shape) == 1:  # norms
            return torch.ones(shape, dtype=block.dtype)
        flat = torch.empty(math.prod(shape), dtype=block.dtype)
        start, done = seed * 1_299_709 % BLOCK, 0
        while done < flat.numel():
            count = min(BLOCK, flat.numel() - done)
            flat[done : done + count] = block[start : start + count]
            start, done = (start + 104_729) % BLOCK, done + count
        return flat.view(shape)

    return make


def largest(config: ModelConfig) -> int:
    """Elements of the largest tensor."""
    return max(math.prod(shape) for shape in parameters(config).values())


def memory_needed(config: ModelConfig, itemsize: int, four_bit: bool) -> int:
    """Bytes of memory that a load takes, the process included."""
    sizes = {name: math.prod(shape) for name, shape in parameters(config).items()}
    linear = sum(n for name, n in sizes.items() if "_proj" in name)
    a_weight = 0.52 if four_bit else itemsize
    model = int((sum(sizes.values()) - linear) * itemsize + linear * a_weight)
    beside = 2 * itemsize * max(sizes.values()) if four_bit else 0  # one quantized, one being read
    return model + beside + PROCESS_BYTES


def check_disk(config: ModelConfig, itemsize: int, place: Path) -> None:
    """Refuse a disk that is too small for the folders.

    Raises:
        ValueError: with what is needed.
    """
    weights = sum(math.prod(shape) for shape in parameters(config).values())
    wanted = int(weights * itemsize * 1.6)  # and the 4-bit folder
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise ValueError(
            f"{place} has {free / 1e9:.0f} GB free, the folders take {wanted / 1e9:.0f}: "
            "name another place with --where"
        )


def bytes_on_disk(folder: Path) -> int:
    """Of the weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def cut(config: ModelConfig) -> ModelConfig:
    """One layer of the same width with a small vocabulary: what float64 has room for."""
    vocabulary = min(config.vocab_size, CHECKED_VOCABULARY)
    return dataclasses.replace(config, num_hidden_layers=1, vocab_size=vocabulary, layer_types=None)


@torch.no_grad()
def check_logits(folder: Path, theirs: Load) -> str:
    """Refuse to go on unless our logits are as near to float64's as transformers'.

    Returns:
        The errors, in a line.

    Raises:
        ValueError: they are not.
    """
    ids = torch.randint(10, (2, 17), generator=torch.Generator().manual_seed(0))
    ours = load_model(folder, dtype="float32")(ids).logits.double()
    peer, truth = (
        theirs(folder, dtype=dtype)(ids).logits.double() for dtype in (torch.float32, torch.float64)
    )
    error, reference = (ours - truth).abs().max().item(), (peer - truth).abs().max().item()
    allowed = 2 * reference + 2 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    if error > allowed:
        raise ValueError(f"logits are off by {error:.2e}, allowed {allowed:.2e}: not timed")
    return f"logits: error {error:.1e}, transformers' {reference:.1e} (float32 against float64)"


@torch.no_grad()
def check_quantized(folder: Path, ours: nn.Module, theirs: nn.Module) -> str:
    """Refuse to go on unless every 4-bit layer is as near to its original as bitsandbytes'.

    Returns:
        The worst, in a line.

    Raises:
        ValueError: one is not.
    """
    import bitsandbytes.functional as bnb

    worst = 0.0
    for name, weight in load_state(folder):
        if "_proj" not in name:
            continue
        layer = ours.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, NF4Linear)
        peer = theirs.get_parameter(name)
        restored = bnb.dequantize_4bit(peer.data, peer.quant_state).float()
        error, reference = (layer.dense_weight() - weight).norm(), (restored - weight).norm()
        worst = max(worst, (error / reference).item())
    if worst > 1.01:
        raise ValueError(f"a layer's 4-bit error is {worst:.3f} times bitsandbytes': not timed")
    return f"nf4: error at most {worst:.4f} times bitsandbytes' in any layer"


@torch.no_grad()
def check_loaded(model: nn.Module, folder: Path) -> int:
    """Compare a loaded model of ours with the dense folder: the first and the last layer, to a bit.

    Dense weights are those of the file, 4-bit ones what `quantize_nf4` makes of them.

    Returns:
        How many tensors were compared.

    Raises:
        ValueError: one differs.
    """
    last = max(int(name.split(".")[2]) for name, _ in model.named_modules() if name.count(".") == 2)
    ends = (f"model.layers.{last}.", "model.layers.0.", "model.norm.")
    compared = 0
    for name, weight in load_state(folder):
        if not name.startswith(ends):
            continue
        layer = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, NF4Linear):
            same = torch.equal(layer.codes.view(-1), quantize_nf4(weight).packed.view(-1))
        else:
            same = torch.equal(layer.get_parameter("weight"), weight)
        if not same:
            raise ValueError(f"{name} was loaded wrongly: not timed")
        compared += 1
    return compared
