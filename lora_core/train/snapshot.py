"""Weights, optimizer and random generators as tensors and JSON, and back, bit for bit.

No pickle: a checkpoint is data, and reading it must not be able to run code.
"""

import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.train.parts import like


def _numpy() -> Any:
    import numpy

    return numpy


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    _numpy().random.seed(seed % 2**32)
    torch.manual_seed(seed)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """The optimizer's state as tensors by `<number>.<name>` and the rest as JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for number, entries in state["state"].items():
        for name, value in entries.items():
            target: dict[str, Any] = tensors if isinstance(value, Tensor) else plain
            target[f"{number}.{name}"] = value
    return tensors, {"groups": state["param_groups"], "plain": plain}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_tensors` took."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["plain"].items()]:
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                entries[name] = like(parameters[number], value)
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})


def generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The global generators' states: torch's as tensors, Python's and NumPy's as JSON."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, gauss = _numpy().random.get_state()
    numpy_state = [kind, keys.tolist(), position, has_gauss, gauss]
    return tensors, {"python": random.getstate(), "numpy": numpy_state}


def restore_generators(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Put back what `generators` took, of GPUs that are there."""
    torch.set_rng_state(tensors["cpu"])
    names = [f"cuda.{i}" for i in range(torch.cuda.device_count())]
    cuda = [tensors[name] for name in names if name in tensors]
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *others = rest["numpy"]
    _numpy().random.set_state((kind, _numpy().array(keys, dtype="uint32"), *others))


def owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies that share no storage, as safetensors wants them."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of copies: tensors may share storage.

    Raises:
        OSError: the disk is full, or the like, for which safetensors has an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(owned(tensors), path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None


def restore_weights(
    parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], where: Path
) -> None:
    """Copy saved weights into the trained parameters.

    Args:
        parameters: the trained ones, by name.
        weights: as saved.
        where: the checkpoint, for the message.

    Raises:
        ValueError: names or shapes differ; nothing was copied.
    """
    wrong: Iterable[str] = sorted(parameters.keys() ^ weights.keys()) or [
        name for name, p in parameters.items() if p.shape != weights[name].shape
    ]
    if wrong:
        raise ValueError(
            f"checkpoint {where.name} holds other trained parameters: "
            f"{', '.join(list(wrong)[:5])}; resume with the model and adapter it was made with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(parameter, weights[name]))
