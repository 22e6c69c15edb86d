"""One training step on fake tensors, and what each part of it would hold in memory.

It is the loop's own step: `CausalLoss` under the run's dtype policy, backward, the optimizer of the
configuration, checkpointing as the run does it. Before it the optimizer takes a step of its own, so
that its state is there, as it is in every step but the first; with `accumulate` above 1 the
gradients of the batch before are there too.

The phases: `forward`, `loss`, then the backward pass of each layer by its number, `start` being
what comes before the last layer (the loss's own) and after the first (the embedding), and `update`.
"""

import contextlib
import io
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lora_core.device import DtypePolicy
from lora_core.models import CausalLM
from lora_core.plan.counting import LiveBytes, Stored, storage_bytes
from lora_core.plan.empty import give_fake_tensors, own_tensors
from lora_core.plan.inside import Inside
from lora_core.quant import NF4Linear, NF4Stack
from lora_core.train.config import TrainConfig
from lora_core.train.optim import make_optimizer, trained_parameters
from lora_core.train.recompute import recomputed_layers
from lora_core.train.step import CausalLoss

__all__ = ["Tally", "tally"]


@dataclass(frozen=True)
class Tally:
    """Bytes of one model in one step."""

    frozen: int
    """weights that are neither trained nor 4-bit, tables and rotary frequencies included"""
    packed: int
    """4-bit weights: codes, scales, nested scales"""
    trained: int
    """trained weights"""
    trained_numel: int
    """their number"""
    gradients: int
    """of the trained weights"""
    optimizer: int
    """its state"""
    kept: int
    """what the layers leave for backward when the last one is done"""
    layer: tuple[Stored, ...]
    """what the last layer added to that"""
    peaks: dict[str, int]
    """phase -> most bytes alive in it: "forward", "loss", "last", "first", "update" """


def tally(model: CausalLM, config: TrainConfig, rows: int, tokens: int, inside: Inside) -> Tally:
    """Run one step of a model on fake tensors.

    Args:
        model: `empty_model`'s, two layers or more; its tensors become fake ones.
        config: the run's.
        rows: B, rows of a batch.
        tokens: T, tokens of a row; all are graded.
        inside: what operators hold inside themselves; its `compute` is the dtype of the products.

    Returns:
        The bytes.
    """
    mode = FakeTensorMode()
    give_fake_tensors(model, mode)
    with mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _tally(model, config, rows, tokens, inside)


def _tally(model: CausalLM, config: TrainConfig, rows: int, tokens: int, inside: Inside) -> Tally:
    parameters = trained_parameters(model)
    live = LiveBytes(inside)
    everything = [tensor for _, tensor in own_tensors(model)]
    packed = storage_bytes(
        tensor
        for module in model.modules()
        if isinstance(module, NF4Linear | NF4Stack)
        for tensor in (module.codes, module.scales, module.scale_absmax, module.scale_offset)
        if tensor is not None
    )
    trained = storage_bytes(parameters.values())
    live.watch(everything)
    resident = live.now
    for parameter in parameters.values():
        parameter.grad = torch.empty_like(parameter)
        live.watch([parameter.grad])
    gradients = live.now - resident
    with live, contextlib.redirect_stderr(io.StringIO()):  # what it has to say of the CPU
        live.phase = "update"
        optimizer = make_optimizer(model, list(parameters.items()), config)
        optimizer.step()
        live.phase = "between"
    state = live.now - resident - gradients
    if config.accumulate == 1:
        optimizer.zero_grad(set_to_none=True)
    before = live.now
    body = _Body(model, live, inside, config.activation_checkpointing)
    policy = DtypePolicy(torch.device("cpu"), inside.compute)
    with live, recomputed_layers(model, config.activation_checkpointing):
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids.clone()}
        live.phase = "forward"
        with policy.autocast():
            value, _ = CausalLoss(config.label_smoothing)(model, batch, 1.0)
        live.phase = "start"
        torch.autograd.backward(value)
        live.phase = "end"
    return Tally(
        frozen=resident - packed - trained,
        packed=packed,
        trained=trained,
        trained_numel=sum(p.numel() for p in parameters.values()),
        gradients=gradients,
        optimizer=state,
        kept=body.kept - before,
        layer=tuple(body.layer),
        peaks=_named(live.peaks, len(body.layers)),
    )


class _Body:
    """Hooks on a model's layers that tell the count where the step is."""

    def __init__(self, model: CausalLM, live: LiveBytes, inside: Inside, recomputing: bool) -> None:
        self.layers, self.live = list(model.model.layers), live
        self.inside, self.recomputing = inside, recomputing
        self.kept, self.seen = 0, 0
        self.layer: list[Stored] = []
        for number, layer in enumerate(self.layers):
            layer.register_forward_hook(self._after(number))
        model.model.norm.register_forward_hook(self._normed)

    def _after(self, number: int):  # type: ignore[no-untyped-def]  # a hook
        def hook(module: nn.Module, args: object, out: Tensor) -> None:
            self.kept = self.live.now
            self.layer = self.live.alive(self.seen)
            self.seen = self.live.seen
            if out.requires_grad:
                out.register_hook(lambda _: self._enter(number))  # type: ignore[no-untyped-call]

        return hook

    def _normed(self, module: nn.Module, args: object, out: Tensor) -> None:
        self.live.phase = "loss"

    def _enter(self, number: int) -> None:
        self.inside.begin_layer(self.recomputing)
        self.live.phase = f"layer {number}"


def _named(peaks: dict[str, int], layers: int) -> dict[str, int]:
    """The peaks of the phases that tell of any number of layers."""
    return {
        "forward": peaks["forward"],
        "loss": max(peaks["loss"], peaks["start"]),
        "last": peaks.get(f"layer {layers - 1}", 0),
        "first": max(peaks.get("layer 0", 0), peaks.get("end", 0)),
        "update": peaks["update"],
    }
