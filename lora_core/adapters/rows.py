"""Rows of one batch that name different adapters: `adapter_rows`.

    with adapter_rows(model, ["a", None, "b"]):     row 0 under a, row 1 the base, row 2 under b
        loss = model(batch of 3).loss

Every host gets a `SiteRows`, which its forward calls: the base on the whole batch, then the LoRA
pairs of all rows together (row_stacks.py), in training and inference alike; an adapter of another
kind runs on its own rows. Rows without an adapter at a site are left out of what is added, so they
are what the base's operator gives for them, bit for bit. A 4-bit base whose kernel takes rows does
all of it in one operator.

PEFT passes the names through hooks, which an exception leaves in place, loops over the adapters of
the batch at every layer, and refuses to train. Here the context sets one attribute a host and takes
it away again; index tensors are made when it is entered, once for all layers.

What it does not do: a forward that is computed again in the backward pass (gradient checkpointing)
needs the context there too, so `backward()` belongs inside it. Hooks on the pairs are not called.

Ref: Chen et al. 2023, Punica, arXiv:2310.18547; Sheng et al. 2023, S-LoRA, arXiv:2311.03285.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.host import Adapted, adapted_modules, spelt
from lora_core.adapters.layers import compute_dtype
from lora_core.adapters.lora import LoRA
from lora_core.adapters.lora_linear import dtypes_with_rows
from lora_core.adapters.row_stacks import PairStacks, is_grouped
from lora_core.targets import nearest

__all__ = ["SiteRows", "adapter_rows"]

Names = tuple[str | None, ...]


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Let each row of a batch name its adapter; in training and in inference.

    Inside, the names alone count, not `set_adapters`; `disable_adapters` still gives the base. A
    context within another one takes its place until it ends.

    Args:
        model: a model with adapters.
        names: one a row (the leading dimension of every adapted module's input): an adapter's name
            or None, the base. Adapters may be of different ranks, kinds and sites.

    Yields:
        None.

    Raises:
        TypeError: names is no sequence of names.
        ValueError: no names, an unknown one, a kind that rows cannot name (a full copy of a module,
            a soft prompt), a merged model; in a forward, a batch of another size.
    """
    hosts = list(adapted_modules(model))
    batch = _Batch(_checked(hosts, names))
    made = [SiteRows(site, host, batch) for site, host in hosts]
    before = [host.mixture for _, host in hosts]
    try:
        for (_, host), mixture in zip(hosts, made, strict=True):
            host.mixture = mixture
        yield
    finally:
        for (_, host), mixture_before in zip(hosts, before, strict=True):
            host.mixture = mixture_before


def _checked(hosts: list[tuple[str, Adapted]], names: Sequence[str | None]) -> Names:
    """The names, after all that can be checked before a batch is there."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            "adapter_rows needs a list with an adapter's name, or None, for each row of the "
            f"batch; got {names!r}"
        )
    if not names:
        raise ValueError("adapter_rows needs a name, or None, for each row of the batch; got none")
    known = list(dict.fromkeys(name for _, host in hosts for name in host.adapters._modules))
    for row, name in enumerate(names):
        if name is not None and not isinstance(name, str):
            raise TypeError(f"row {row} must name an adapter, or be None; got {name!r}")
        if name is not None and name not in known:
            raise ValueError(
                f"row {row} names {name!r}, but no adapter of the model is called so; "
                f"{nearest(name, known)}"
            )
    wanted = set(names)
    for site, host in hosts:
        if host.merged is not None:
            raise ValueError(
                f"adapter_rows while {spelt(site)} is merged: {host.merged.way_back} first"
            )
        for name, adapter in host.adapters._modules.items():
            if name in wanted and adapter is not None and adapter.mixes is None:
                raise ValueError(
                    f"rows of a batch cannot name {name!r}: it has a {type(adapter).__name__} at "
                    f"{spelt(site)}, which works on whole batches; call set_adapters instead"
                )
    return tuple(names)


class _Indices(NamedTuple):
    """Which rows take which of some adapters; int64."""

    slots: Tensor  # (B,): which one, -1 for none
    taken: Tensor  # (H,): the same of the H rows that take one
    rows: Tensor | None  # (H,): these rows; None: all of them
    in_order: bool  # whether row i takes adapter i


class _Batch:
    """The rows' names, and index tensors that sites share."""

    def __init__(self, names: Names) -> None:
        self.names, self.wanted = names, {name for name in names if name is not None}
        self._indices: dict[tuple[tuple[str, ...], torch.device], _Indices] = {}
        self._of_tokens: dict[tuple[int, torch.Size], Tensor] = {}

    def indices(self, some: tuple[str, ...], device: torch.device) -> _Indices:
        """Index tensors for adapters in this order; the same for all sites that have these."""
        key = (some, device)
        if key not in self._indices:
            order: dict[str | None, int] = {name: slot for slot, name in enumerate(some)}
            slots = [order.get(name, -1) for name in self.names]
            rows = [row for row, slot in enumerate(slots) if slot >= 0]
            taken = [slots[row] for row in rows]
            # not in inference mode, or training could not use what evaluation made
            with torch.inference_mode(False):
                made = (torch.tensor(values, device=device) for values in (slots, taken, rows))
                first, second, third = made
            all_rows = len(rows) == len(slots)
            in_order = taken == list(range(len(some)))
            self._indices[key] = _Indices(first, second, None if all_rows else third, in_order)
        return self._indices[key]

    def of_tokens(self, slots: Tensor, lead: torch.Size) -> Tensor:
        """Slots (B,) for each token of inputs (*lead, K), int32, the same for all sites."""
        if torch.compiler.is_compiling():
            return slots
        key = (id(slots), lead)
        if key not in self._of_tokens:
            if len(self._of_tokens) > 16:  # a text that grows by a token a step
                self._of_tokens.clear()
            each = slots.to(torch.int32).view(-1, *(1,) * (len(lead) - 1))
            with torch.inference_mode(False):
                self._of_tokens[key] = each.expand(lead).contiguous()
        return self._of_tokens[key]


class SiteRows:
    """Runs one site with the adapters that the rows name; a host's `mixture`.

    Args:
        site: name of the module, for messages.
        host: the host.
        batch: the rows.
    """

    def __init__(self, site: str, host: Adapted, batch: _Batch) -> None:
        self.site, self.batch, self.size = site, batch, len(batch.names)
        wanted, adapters = batch.wanted, host.adapters._modules
        here: dict[str, Any] = {n: adapter for n, adapter in adapters.items() if n in wanted}
        kinds = {kind: is_grouped(kind) for kind in {*map(type, here.values())}}
        pairs = {n: a for n, a in here.items() if kinds[type(a)] and a.mixes == "grouped"}
        # at one module forms differ in their class alone
        form = next((type(pair.form) for pair in pairs.values()), None)
        pairs = {n: pair for n, pair in pairs.items() if type(pair.form) is form}
        self.pairs: PairStacks | None = None
        self.chosen: Tensor | None = None  # the rows with a pair; None: all have one
        self.dtypes: tuple[torch.dtype, ...] = ()  # in which the base does all in one product
        if pairs:
            self._group(host, pairs)
        self.others = [
            (adapter, batch.indices((name,), _device(adapter)).rows)
            for name, adapter in here.items()
            if name not in pairs
        ]
        self.idle = not here

    def refresh(self) -> None:
        """Make kept stacks anew; a compiled model does not look whether a tensor has changed."""
        if self.pairs is not None and self.pairs.kept is not None:
            self.pairs.keep(self.pairs.kept.up.dtype)

    def _group(self, host: Adapted, pairs: dict[str, LoRA]) -> None:
        """Prepare the pairs of all rows."""
        some = list(pairs.values())
        indices = self.batch.indices(tuple(pairs), some[0].A.device)
        self.slots, self.chosen = indices.slots, indices.rows
        if (dtypes := dtypes_with_rows(host.base)) and all(pair.is_pair for pair in some):
            self.dtypes, self.ones = dtypes, torch.ones(len(some), device=self.slots.device)
        # an entry a row costs no more than twice an entry a pair, and saves gathering
        per_row = not self.dtypes and len(indices.taken) <= 2 * len(some)
        self.pairs = PairStacks(some, indices.taken, per_row, indices.in_order)
        if self.pairs.frozen or not torch.is_grad_enabled():
            self.pairs.keep()

    def __call__(self, host: Adapted, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output of the whole batch."""
        if self.idle:
            return host.base(*args, **kwargs)
        x: Any = args[0] if args else next(iter(kwargs.values()), None)
        self._check_size(x)
        if self.pairs is not None and self._in_one_product(host, x, len(args) + len(kwargs)):
            down, up, _ = self.pairs.stacks(torch.float32)
            tokens = self.batch.of_tokens(self.slots, x.shape[:-1])
            base: Any = host.base
            return base.linear_with_update(x, down, up, self.ones, tokens)
        y = host.base(*args, **kwargs)
        if self.pairs is not None:
            y = self._with_pairs(host, self.pairs, x, y)
        for adapter, rows in self.others:
            y = _on_rows(adapter, rows, x, y, host.base)
        return y

    def _check_size(self, x: Any) -> None:
        if isinstance(x, Tensor) and x.dim() > 0 and len(x) == self.size:
            return
        told = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"type {type(x).__name__}"
        raise ValueError(
            f"adapter_rows names adapters for {self.size} rows, but the input of "
            f"{spelt(self.site)} has {told}: its leading dimension must be {self.size}, a name "
            "for each row of the batch"
        )

    def _in_one_product(self, host: Adapted, x: Tensor, inputs: int) -> bool:
        """Whether the base multiplies, adds and rounds in one operator now."""
        if not self.dtypes or inputs != 1 or self.others or compute_dtype(x) not in self.dtypes:
            return False
        dropping = self.pairs is not None and self.pairs.dropout and host.training
        if torch.compiler.is_compiling():
            return not dropping
        return not dropping and bool(dtypes_with_rows(host.base))

    def _with_pairs(self, host: Adapted, pairs: PairStacks, x: Tensor, y: Tensor) -> Tensor:
        """Add the updates of the rows with a pair; the other rows of y are not touched."""
        # y - (0 - update), not y + update: -0 stays -0 under an update of 0
        if self.chosen is None:
            update = pairs.update(x, y, host.base, host.training)
            return y - (0.0 - update.to(y.dtype))
        rows = self.chosen
        update = pairs.update(x.index_select(0, rows), y, host.base, host.training)
        return y.index_add(0, rows, 0.0 - update.to(y.dtype), alpha=-1)


def _device(adapter: Adapter) -> torch.device:
    tensor = next((t for t in (*adapter.parameters(), *adapter.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _on_rows(adapter: Adapter, rows: Tensor | None, x: Tensor, y: Any, base: nn.Module) -> Any:
    """Run an adapter on its own rows of the output, or of the first of a tuple."""
    if rows is None:
        return adapter(x, y, base)
    first = y[0] if isinstance(y, tuple) else y
    part = first.index_select(0, rows)
    done = adapter(x.index_select(0, rows), (part, *y[1:]) if isinstance(y, tuple) else part, base)
    whole = first.index_copy(0, rows, done[0] if isinstance(y, tuple) else done)
    return (whole, *y[1:]) if isinstance(y, tuple) else whole
