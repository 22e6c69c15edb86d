"""What merging learns from sample inputs: second moments of layers' inputs, and output errors.

An output error |X E ᵀ|² needs of the inputs X (tokens, K) only Xᵀ X (K, K), whatever the number of
tokens, so that is what is gathered, by hooks, while the adapted model runs on the samples. Of each
call the first three quarters of the rows go into one moment, for choosing codes, and the last
quarter into another, for judging what was chosen: with four sequences or more in a batch these are
whole sequences that the choice has not seen. Padding (zeros of `attention_mask`) is left out.

The moments of all layers at once may be larger than the model (2·K² float64 numbers a layer), so
layers are taken in groups that fit into a budget, and the samples run once a group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters.host import Adapted, Merged
from lora_core.adapters.layers import is_linear, linear_features

__all__ = ["Moments", "check_samples", "gather", "groups", "model_output_error"]

BUDGET = 2 << 30  # bytes of moments that are gathered in one run over the samples


@dataclass
class Moments:
    """Second moments Xᵀ X of a layer's inputs X.

    Attributes:
        chosen_on: of the rows that codes are chosen on, (K, K) float64.
        held_out: of the other rows, (K, K) float64.
        rows: how many held-out rows there were.
    """

    chosen_on: Tensor
    held_out: Tensor
    rows: int = 0

    def add(self, x: Tensor) -> None:
        """Add the rows of one call, (n, K)."""
        x = x.to(torch.promote_types(torch.float32, x.dtype))
        first, last = _parted(x)
        self.chosen_on += first.t() @ first
        self.held_out += last.t() @ last
        self.rows += len(last)


def _parted(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows to choose on, and the last quarter, to judge by."""
    cut = len(rows) - (len(rows) + 2) // 4
    return rows[:cut], rows[cut:]


def check_samples(samples: object) -> list[Any]:
    """The samples as a list that can be gone through again; ValueError if there are none."""
    if isinstance(samples, Tensor | Mapping | str) or not hasattr(samples, "__iter__"):
        raise TypeError(
            "samples must be a list of batches, each a tensor, a tuple of arguments or a dict of "
            f"them; got {type(samples).__name__}"
        )
    batches = list(samples)
    if not batches:
        raise ValueError("samples is empty: give some batches that the model can be called with")
    return batches


def groups(hosts: Sequence[Adapted], budget: int | None = None) -> Iterator[list[Adapted]]:
    """The linear layers among the hosts, in groups whose moments fit into the budget."""
    room = BUDGET if budget is None else budget
    group: list[Adapted] = []
    used = 0
    for host in hosts:
        if not is_linear(host.base):
            continue
        need = 2 * 8 * linear_features(host.base)[0] ** 2
        if group and used + need > room:
            yield group
            group, used = [], 0
        group.append(host)
        used += need
    if group:
        yield group


@torch.no_grad()
def gather(
    model: nn.Module, hosts: Sequence[Adapted], samples: Sequence[Any]
) -> dict[int, Moments]:
    """Run the model and add up the second moments of what some hosts are called with.

    Args:
        model: as it is to be merged; it runs in evaluation mode.
        hosts: of linear layers.
        samples: batches.

    Returns:
        The moments by the identity of the host; none for one that no sample reached.
    """
    found: dict[int, Moments] = {}
    mask: Tensor | None = None

    def watch(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if id(host) not in found:
            k = x.shape[-1]
            zeros = torch.zeros(2, k, k, dtype=torch.float64, device=x.device)
            found[id(host)] = Moments(zeros[0], zeros[1])
        found[id(host)].add(_rows(x, mask))

    hooks = [host.register_forward_pre_hook(watch, with_kwargs=True) for host in hosts]
    try:
        with evaluating(model):
            for batch in samples:
                mask = _mask(batch)
                _call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def model_output_error(
    model: nn.Module, plan: Sequence[tuple[Adapted, tuple[str, ...], nn.Module]], samples: list[Any]
) -> float | None:
    """|merged - adapted| / |adapted - before| over a model's outputs on the held-out rows.

    Args:
        model: not merged yet, and left so.
        plan: (host, adapters to merge there, the merged module).
        samples: batches.

    Returns:
        The ratio; None if the outputs are no tensor (nor have one as `.logits` or first), or do
        not change.
    """
    miss = size = 0.0
    with evaluating(model):
        for batch in samples:
            with _states(plan, lambda host, names, module: None):
                adapted = _output(_call(model, batch), batch)
            with _states(plan, _without):
                before = _output(_call(model, batch), batch)
            with _states(plan, _merged):
                merged = _output(_call(model, batch), batch)
            if adapted is None or before is None or merged is None:
                return None
            miss += float((merged - adapted).square().sum())
            size += float((adapted - before).square().sum())
    return (miss / size) ** 0.5 if size else None


def _without(host: Adapted, names: tuple[str, ...], module: nn.Module) -> None:
    host.active = [name for name in host.active if name not in names]


def _merged(host: Adapted, names: tuple[str, ...], module: nn.Module) -> None:
    host.merged = Merged(names, module)


@contextmanager
def _states(
    plan: Sequence[tuple[Adapted, tuple[str, ...], nn.Module]],
    change: Callable[[Adapted, tuple[str, ...], nn.Module], None],
) -> Iterator[None]:
    """Change hosts for a while."""
    before = [(host, host.active, host.merged) for host, _, _ in plan]
    try:
        for host, names, module in plan:
            change(host, names, module)
        yield
    finally:
        for host, active, merged in before:
            host.active, host.merged = active, merged


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows (n, K) of a layer's input (…, K), padding left out where it has a token each."""
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask.to(x.device).bool()]
    return x.reshape(-1, x.shape[-1])


def _output(output: Any, batch: Any) -> Tensor | None:
    """The held-out rows of a model's output in float32."""
    found = getattr(output, "logits", output)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        return None
    return _parted(_rows(found, _mask(batch)))[1].float()
