r"""A weighted sum of LoRA adapters as one new adapter: exactly, at a lower rank, by TIES or DARE.

    ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ  =  [w₁s₁B₁, w₂s₂B₂, …] [A₁; A₂; …]             exact: rank Σ rᵢ, scaling 1

Every adapter comes in with what it really applies: its own rank and scaling at each layer
(patterns, rsLoRA), the blocks of fused parts, the product that a start subtracts. Layers that only
some of the adapters have get the sum of those. With weights such as [1, -1] one is subtracted.

* exact     the sum itself, by concatenation; weights and scalings go into B
* svd       its best approximation of a rank (Eckart-Young), from the factors: no matrix is formed
* ties      of each ΔWᵢ the `density` largest elements stay; each element's sign is that of the
            weighted sum; the mean of those that agree with it; then SVD to a rank
* dare      elements of each ΔWᵢ are dropped at random, 1 - density of them, the others divided by
            density; summed; then SVD to a rank. dare_ties: TIES' signs and mean in place of the sum

TIES and DARE choose elements, so they work on ΔW; the papers choose among those of the whole model,
here (as in PEFT) among those of a layer. With n adapters of weight 1, ties is the paper's mean, not
a sum. Trained biases are combined linearly by every method.

PEFT's "linear" adds √(wᵢsᵢ) Aᵢ and √(wᵢsᵢ) Bᵢ to one pair of rank r. The product then holds the
cross terms Bᵢ Aⱼ of adapters that never met, of the size of the sum itself, so it is left out:
"exact" is the linear combination, "svd" the one of rank r.

Ref: Yadav et al. 2023, TIES-Merging, arXiv:2306.01708, algorithm 1; Yu et al. 2023, DARE,
arXiv:2311.03099, section 3.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters.adapter import Adapter
from lora_core.adapters.biases import TrainedBias
from lora_core.adapters.host import Adapted, adapted_modules, spelt
from lora_core.adapters.inject import attach_built, refuse_name
from lora_core.adapters.lora import LoRA
from lora_core.adapters.lora_config import LoRAConfig, config_of_ranks
from lora_core.adapters.switch import adapter_names
from lora_core.adapters.ties import mixed_matrix, sketched
from lora_core.adapters.truncate import truncated
from lora_core.adapters.update import Update, minus, update_of
from lora_core.targets import nearest, unwrap

__all__ = ["CombineReport", "LayerCombination", "combine_adapters"]

METHODS = ("exact", "svd", "ties", "dare", "dare_ties")
_ELEMENTWISE, _RANDOM = METHODS[2:], METHODS[3:]


@dataclass(frozen=True)
class LayerCombination:
    """What became of one layer.

    Attributes:
        name: the module.
        rank: r of the new pair.
        error: |ΔW_new - Σ wᵢ ΔWᵢ| / |Σ wᵢ ΔWᵢ|, Frobenius norms; where the terms cancel, relative
            to Σ |wᵢ ΔWᵢ|. With ties and dare it is no error but how far they go from the sum.
    """

    name: str
    rank: int
    error: float


@dataclass(frozen=True)
class CombineReport:
    """What `combine_adapters` made; `print` it.

    Attributes:
        name: of the new adapter.
        method: how it was made.
        layers: one entry a layer.
    """

    name: str
    method: str
    layers: tuple[LayerCombination, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        layers = [dict(vars(layer)) for layer in self.layers]
        return {"name": self.name, "method": self.method, "layers": layers}

    def __str__(self) -> str:
        worst = max((layer.error for layer in self.layers), default=0.0)
        head = f"{self.name!r} ({self.method}): {len(self.layers)} layers"
        lines = [f"{head}, at most {worst:.3%} off the exact sum"]
        lines += [f"  {one.name}: rank {one.rank}, {one.error:.3%} off" for one in self.layers]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Options:
    method: str
    rank: int | None
    density: float | None
    generator: torch.Generator | None


@torch.no_grad()
def combine_adapters(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    method: str = "exact",
    name: str = "combined",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> CombineReport:
    """Add a weighted combination of adapters as a new one; it is not active yet, nor trained.

    Args:
        model: a model with the adapters.
        names: LoRA adapters of any rank, scaling and set of layers.
        weights: one a name; negative ones subtract.
        method: "exact", "svd", "ties", "dare" or "dare_ties"; see this module's docstring.
        name: of the new adapter, new to the model.
        rank: of the new pairs (all methods but exact); None: the largest among the adapters at the
            layer. With grouped convolutions rounded down to a multiple of the groups.
        density: share of the elements that stay (ties, dare, dare_ties), in (0, 1].
        seed: makes dare's choice repeatable; None draws from torch's global generator.

    Returns:
        Rank and relative error by layer, against the exact sum.

    Raises:
        ValueError: an unknown name, a new one that is taken, weights that do not match or are not
            finite, a kind that is no sum of low-rank products (DoRA, bottlenecks, full copies, …),
            an option out of range or of another method, a merged model. The model is then as it
            was.
    """
    refuse_name(model, name)
    _check_names(model, names, weights)
    options = _options(method, rank, density, seed)
    terms = [(n, float(w)) for n, w in zip(names, weights, strict=True) if w != 0]
    parts = {
        site: found
        for site, host in adapted_modules(model)
        if (found := [(host.adapter(n), n, w) for n, w in terms if n in host.adapters])
    }
    hosts = dict(adapted_modules(model))
    sums = {site: _scaled(site, hosts[site], some) for site, some in parts.items()}
    made = {site: _combined(site, some, options) for site, some in sums.items()}
    config, built = _built(hosts, parts, sums, made)
    _attach_inactive(model, config, name, built)
    layers = [_entry(site, sums[site], *pair) for site, pair in made.items() if pair is not None]
    return CombineReport(name, method, tuple(layers))


def _check_names(model: nn.Module, names: Sequence[str], weights: Sequence[float]) -> None:
    known = adapter_names(model)
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise ValueError(f"combine_adapters needs a list of different adapters, got {names!r}")
    for name in names:
        if name not in known:
            raise ValueError(f"no adapter {name!r} in the model; {nearest(name, known)}")
    if len(weights) != len(names):
        raise ValueError(f"{len(names)} adapters need a weight each, got {len(weights)} weights")
    for name, weight in zip(names, weights, strict=True):
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} must be a finite number, got {weight!r}")
    if not any(weights):
        raise ValueError("all weights are 0: there is nothing to combine")


def _options(method: str, rank: int | None, density: float | None, seed: int | None) -> _Options:
    if method == "linear":
        raise ValueError(
            "method='linear' would multiply each adapter's A with the others' B: 'exact' is the "
            "linear combination, 'svd' the best one of a rank"
        )
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if rank is not None and method == "exact":
        raise ValueError("method='exact' has the sum of the ranks; use 'svd' to choose a rank")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    _check_density(method, density)
    if method not in _RANDOM:
        if seed is not None:
            raise ValueError(f"method={method!r} draws nothing at random: it takes no seed")
        return _Options(method, rank, density, None)
    drawn = int(torch.randint(2**62, ())) if seed is None else seed
    return _Options(method, rank, density, torch.Generator().manual_seed(drawn))


def _check_density(method: str, density: float | None) -> None:
    if density is None and method in _ELEMENTWISE:
        raise ValueError(f"method={method!r} needs a density, the share of elements that stay")
    if density is not None and method not in _ELEMENTWISE:
        raise ValueError(f"method={method!r} keeps all elements: it takes no density")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density!r}")


def _scaled(site: str, host: Adapted, parts: list[tuple[Adapter, str, float]]) -> list[Update]:
    """wᵢ ΔWᵢ of the adapters at a layer, biases with it."""
    found = []
    for adapter, name, weight in parts:
        if type(adapter) is TrainedBias:
            change = (adapter.bias.double() - adapter.bias0.double()) * weight
            found.append(Update((len(change), 0), bias=change))
            continue
        if type(adapter) is not LoRA:
            raise ValueError(
                f"{name!r} cannot be combined: at {spelt(site)} it is a {type(adapter).__name__}, "
                "and only LoRA's updates add up; convert_to_lora makes one of it where it can"
            )
        try:
            update = update_of(adapter, unwrap(host))
        except ValueError as error:
            raise ValueError(f"{name!r} at {spelt(site)} cannot be combined: {error}") from None
        assert update.up is not None
        bias = None if update.bias is None else update.bias * weight
        found.append(replace(update, up=update.up * weight, bias=bias))
    return found


def _combined(site: str, terms: list[Update], options: _Options) -> tuple[Tensor, Tensor] | None:
    """A (r, K) and B (N, r/g) of the new pair, float32, scaling 1; None where no term has one."""
    terms = [term for term in terms if term.up is not None]
    if not terms:
        return None
    whole = _joined(terms)
    assert whole.down is not None
    assert whole.up is not None
    if not bool(whole.up.isfinite().all() and whole.down.isfinite().all()):
        raise ValueError(f"an adapter at {spelt(site)} holds NaN or infinity")
    if options.method == "exact":
        return whole.down.float(), whole.up.float()
    largest = max(len(term.down) for term in terms if term.down is not None)
    rank = options.rank or largest
    rank = max(rank // whole.groups, 1) * whole.groups
    if options.method in _ELEMENTWISE:
        assert options.density is not None
        matrix = mixed_matrix(terms, options.method, options.density, options.generator)
        whole = sketched(Update(whole.shape, whole.groups, matrix=matrix), rank)
    best = truncated(site, whole, rank, None)
    if best.down is None or best.up is None:  # nothing is left: the smallest pair of zeros
        g = whole.groups
        return torch.zeros(g, whole.shape[1]), torch.zeros(whole.shape[0], 1)
    return best.down, best.up


def _joined(terms: list[Update]) -> Update:
    """The sum, as one product."""
    groups, columns = terms[0].groups, terms[0].shape[1]
    downs = [term.down.view(groups, -1, columns) for term in terms if term.down is not None]
    ups = [term.up for term in terms if term.up is not None]
    down = torch.cat(downs, dim=1).view(-1, columns)  # (ΣR, K)
    return Update(terms[0].shape, groups, down=down, up=torch.cat(ups, dim=1))


def _entry(site: str, terms: list[Update], down: Tensor, up: Tensor) -> LayerCombination:
    terms = [term for term in terms if term.up is not None]
    whole = _joined(terms)
    size, largest = whole.norm(), sum(term.norm() for term in terms)
    # a sum that cancels to rounding has no relative error of its own
    size = size if size > 1e-6 * largest else largest
    error = minus(whole, down.to(_device(whole)), up.to(_device(whole))).norm()
    return LayerCombination(site, len(down), error / size if size else 0.0)


def _device(update: Update) -> torch.device:
    assert update.down is not None
    return update.down.device


def _built(
    hosts: Mapping[str, Adapted],
    parts: Mapping[str, list[tuple[Adapter, str, float]]],
    sums: Mapping[str, list[Update]],
    made: Mapping[str, tuple[Tensor, Tensor] | None],
) -> tuple[LoRAConfig, dict[str, Adapter]]:
    """The configuration that the new adapter is saved with, and its parts."""
    pairs = {site: pair for site, pair in made.items() if pair is not None}
    if not pairs:
        raise ValueError("the adapters have no LoRA pair between them: there is nothing to combine")
    changes = {site: _bias(terms) for site, terms in sums.items()}
    changed = [site for site in pairs if changes[site] is not None]
    lookups = any(isinstance(unwrap(hosts[site]), nn.Embedding) for site in pairs)
    # biases of other modules too: "all"; beside an embedding, which can have none: "lora_only"
    bias = "all" if len(pairs) < len(made) else "lora_only" if changed and lookups else "none"
    placed = {site for site in pairs if getattr(unwrap(hosts[site]), "bias", None) is not None}
    beside = any(bias == "none" or site not in placed for site in changed)
    ranks = {site: len(down) for site, (down, _) in pairs.items()}
    config = config_of_ranks(ranks, bias=bias, lora_bias=beside)
    built: dict[str, Adapter] = {}
    for site, pair in made.items():
        module, change = unwrap(hosts[site]), changes[site]
        if pair is None:
            beside_it = TrainedBias(module)
            if change is not None:
                beside_it.bias.add_(change.to(beside_it.bias))
            built[site] = beside_it
            continue
        lora = config.build(site, module)
        assert isinstance(lora, LoRA)
        lora.start_at(*pair, subtract=False)
        target = lora.up_bias if lora.bias is None else lora.bias
        if change is not None and target is not None:
            target.add_(change.to(target))
        built[site] = lora
    for site, adapter in built.items():
        bases = {part.trained_on for part, _, _ in parts[site]}
        adapter.trained_on = bases.pop() if len(bases) == 1 else None
    return config, built


def _bias(terms: list[Update]) -> Tensor | None:
    """What the biases at a layer change by, all together."""
    changes = [term.bias for term in terms if term.bias is not None]
    return torch.stack(changes).sum(0).cpu() if changes else None


def _attach_inactive(
    model: nn.Module, config: LoRAConfig, name: str, built: dict[str, Adapter]
) -> None:
    """Put the adapter in, and leave what is active and what is trained as it was."""
    active = [(host, list(host.active)) for _, host in adapted_modules(model)]
    trained = [(p, p.requires_grad) for p in model.parameters()]
    attach_built(model, config, name, built, trainable=False)
    for host, names in active:
        host.active = names
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)
