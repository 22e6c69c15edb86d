"""A few trainable rows of an embedding and its head, for added tokens.

Training the whole embedding for three new tokens would store vocabulary x width floats; here only
the rows of the named ids are trained. The rows *replace* those of the frozen weight (PEFT stores
the same full rows and calls them `trainable_tokens_delta`), so a row stays right when the frozen
one below it was initialised anew.

A head whose weight is tied to the embedding shares the rows: it is the same Parameter, and
merging keeps the tie.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.layers import compute_dtype, is_linear, scaled_as
from lora_core.targets import select_modules, sites, unwrap

__all__ = [
    "TrainableTokens",
    "edit_configs",
    "grow_vocabulary",
    "module_name",
    "tied_modules",
    "token_rows",
]


class TrainableTokens(Adapter):
    """Replaces some rows of an embedding, or of a linear head, by trainable ones.

    Args:
        rows: (n, D) start, or the Parameter of the embedding that a tied head shares.
        index: (n,) token ids, distinct, int64.
        vocabulary: V, rows of the weight.
        head: whether the site is a linear head rather than an embedding.
        follows: whether the rows are another site's, which then saves them.

    Attributes:
        rows: (n, D) float32.
    """

    keeps_ties = True

    def __init__(
        self, rows: Tensor, index: Tensor, vocabulary: int, head: bool, follows: bool = False
    ) -> None:
        super().__init__()
        self.head, self.follows = head, follows
        self.rows = rows if isinstance(rows, nn.Parameter) else nn.Parameter(rows)
        position = torch.full((vocabulary,), -1)
        position[index] = torch.arange(len(index))
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("position", position, persistent=False)  # id -> row, or -1
        self.index: Tensor
        self.position: Tensor

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """Put the rows' values in place of the frozen ones'.

        Args:
            x: (…) token ids, or (…, D) hidden states for a head.
            y: (…, D) embeddings, or (…, V) logits.
            base: the embedding or head.

        Returns:
            As y.
        """
        if self.head:
            dtype = compute_dtype(x)
            bias = getattr(base, "bias", None)
            bias = None if bias is None else bias[self.index].to(dtype)
            logits = F.linear(x.to(dtype), self.rows.to(dtype), bias)  # (…, n)
            return y.index_copy(-1, self.index, logits.to(y.dtype))
        row = self.position[x]  # (…)
        values = F.embedding(row.clamp(min=0), self.rows).to(y.dtype)  # (…, D)
        return torch.where((row >= 0).unsqueeze(-1), scaled_as(base, values), y)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight with the rows in their places."""
        return weight.index_copy(0, self.index, self.rows.to(weight.dtype)), bias

    def tensors(self) -> dict[str, Tensor]:
        """Return the rows under PEFT's name; nothing where they are another site's."""
        return {} if self.follows else {"token_adapter.trainable_tokens_delta": self.rows}


def token_rows(model: nn.Module, indices: list[int] | dict[str, list[int]]) -> dict[str, Adapter]:
    """Trainable rows for the input embedding, or for the modules named, and what is tied to them.

    Args:
        model: a model with `get_input_embeddings()` if `indices` is a list.
        indices: token ids; or {module name or suffix: ids}.

    Returns:
        {module name: TrainableTokens}.

    Raises:
        ValueError: no embedding, ids out of range or repeated, or differing ids for tied modules.
    """
    if not isinstance(indices, dict):
        embedding = _part(model, "get_input_embeddings")
        if embedding is None:
            raise ValueError(
                "trainable_token_indices: the model has no get_input_embeddings(); "
                "name the module: {'embed': [ids]}"
            )
        indices = {module_name(model, embedding): indices}
    built: dict[str, Adapter] = {}
    for pattern, ids in indices.items():
        option = "trainable_token_indices"
        names = select_modules(model, [pattern], kind=_has_rows, option=option)
        if len(names) > 1:
            raise ValueError(f"{option}: {pattern!r} matches {names}; name one module")
        _add_rows(model, names[0], _checked(model, names[0], ids), built)
    return built


def _has_rows(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or is_linear(module)


def _checked(model: nn.Module, name: str, ids: list[int]) -> Tensor:
    """Token ids as a tensor, after all checks."""
    weight = getattr(unwrap(dict(sites(model))[name]), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(f"trainable_token_indices: {name!r} has no floating-point weight")
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"trainable_token_indices: ids must be distinct and some, got {ids}")
    if wrong := [i for i in ids if not 0 <= i < len(weight)]:
        raise ValueError(
            f"trainable_token_indices: id {wrong[0]} is not in the {len(weight)} rows of {name!r}; "
            f"call grow_vocabulary(model, {max(ids) + 1}) first"
        )
    return torch.tensor(ids, dtype=torch.int64)


def _add_rows(model: nn.Module, name: str, index: Tensor, built: dict[str, Adapter]) -> None:
    """Add the adapter of one named module and those of the modules tied to it.

    The rows belong to the embedding where there is one, also where its head was named: PEFT takes
    rows of an embedding for its head's too, but not the other way round.
    """
    modules = {site: unwrap(module) for site, module in sites(model)}
    if not isinstance(modules[name], nn.Embedding):
        tied = tied_modules(model, modules[name])
        name = next((other for other, m in tied if isinstance(m, nn.Embedding)), name)
    if name in built:
        known = built[name]
        assert isinstance(known, TrainableTokens)
        if not torch.equal(known.index, index):
            raise ValueError(
                f"trainable_token_indices: {name!r} is tied to another module named there; "
                "both need the same ids"
            )
        return
    module = modules[name]
    weight: Tensor = module.weight  # type: ignore[assignment]  # checked by the caller
    start = weight.detach()[index.to(weight.device)].float().cpu()
    first = TrainableTokens(start, index, len(weight), head=not isinstance(module, nn.Embedding))
    built[name] = first
    for other, tied_module in tied_modules(model, module):
        head = not isinstance(tied_module, nn.Embedding)
        built[other] = TrainableTokens(first.rows, index, len(weight), head, follows=True)


def tied_modules(model: nn.Module, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules outside of one that hold a parameter of it (names, modules)."""
    own = {id(p) for p in module.parameters()}
    seen = {id(part) for part in module.modules()}
    for name, site in sites(model):
        other = unwrap(site)
        if id(other) not in seen and own & {id(p) for p in other._parameters.values()}:
            seen.add(id(other))
            yield name, other


def module_name(model: nn.Module, module: nn.Module) -> str:
    """Name of a module in the original model; ValueError if it is not in it."""
    wanted = unwrap(module)
    for name, site in sites(model):
        if unwrap(site) is wanted:
            return name
    raise ValueError(f"the model does not contain this {type(wanted).__name__}")


def _part(model: nn.Module, method: str) -> nn.Module | None:
    """What `get_input_embeddings()` or `get_output_embeddings()` of the model or a part returns."""
    for _, site in sites(model):
        ask = getattr(unwrap(site), method, None)
        part = ask() if callable(ask) else None
        if isinstance(part, nn.Module):
            return part
    return None


def grow_vocabulary(model: nn.Module, new_size: int) -> None:
    """Give embedding and head rows for new tokens, each the mean of the rows that are there.

    Ties stay, and so do `requires_grad` and dtype; `config.vocab_size` and attributes called
    `vocab_size` follow.

    Args:
        model: one with `get_input_embeddings()`, before adapters are added to these two.
        new_size: V afterwards; the present size changes nothing.

    Raises:
        ValueError: no embedding, fewer rows than now, an adapted or 4-bit embedding or head.
    """
    embedding, head = _part(model, "get_input_embeddings"), _part(model, "get_output_embeddings")
    if embedding is None:
        raise ValueError("grow_vocabulary: the model has no get_input_embeddings()")
    parts = [embedding] if head is None else [embedding, head]
    for part in parts:
        weight = getattr(part, "weight", None)
        if unwrap(part) is not part or not isinstance(weight, Tensor):
            raise ValueError("grow_vocabulary: grow before adding adapters or quantizing the head")
        if not weight.is_floating_point() or len(weight) > new_size:
            raise ValueError(
                f"grow_vocabulary: the model has {len(weight)} rows of {weight.dtype}; "
                f"it can only grow, and not to {new_size}"
            )
    old_size = len(embedding.weight)  # type: ignore[arg-type]  # checked above
    grown: dict[int, nn.Parameter] = {}
    for part in parts:
        for key in ("weight", "bias"):
            old = part._parameters.get(key)
            if old is not None and (key == "weight" or not isinstance(part, nn.Embedding)):
                part._parameters[key] = grown.setdefault(id(old), _with_mean_rows(old, new_size))
        setattr(
            part, "num_embeddings" if isinstance(part, nn.Embedding) else "out_features", new_size
        )
    edit_configs(model, vocab_size=new_size)
    for module in model.modules():
        if module.__dict__.get("vocab_size") == old_size:
            module.vocab_size = new_size  # type: ignore[assignment]  # an int attribute


def _with_mean_rows(old: nn.Parameter, new_size: int) -> nn.Parameter:
    data = old.detach()
    mean = data.float().mean(0, keepdim=True).to(data.dtype)  # (1, …)
    new = mean.expand(new_size - len(data), *data.shape[1:])
    return nn.Parameter(torch.cat([data, new]), requires_grad=old.requires_grad)


def edit_configs(model: nn.Module, **changes: object) -> None:
    """Change fields of the `config` objects in a model, where they have them.

    Args:
        model: any module; frozen dataclasses are replaced, other objects changed in place.
        **changes: field = value.
    """
    for module in model.modules():
        config = module.__dict__.get("config")
        known = {key: value for key, value in changes.items() if hasattr(config, key)}
        if not known:
            continue
        parameters = getattr(type(config), "__dataclass_params__", None)
        if parameters is not None and parameters.frozen:
            module.config = dataclasses.replace(config, **known)  # type: ignore[type-var, assignment]
        else:
            for key, value in known.items():
                setattr(config, key, value)
