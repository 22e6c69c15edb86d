"""What merging did, layer by layer: how much of each update is in what was stored.

Two questions, and they have different answers. *In the weights*: of the update D = W' - W, how much
is there in stored - W. *In the outputs*: how far do outputs on sample inputs X miss, as a share of
what the update does to them, |X (stored - W')ᵀ| / |X Dᵀ|; 0 is exact, 1 is as far as without the
update. Requantized weights may keep little of D and still give its outputs, or the other way round;
the outputs are what counts.
"""

import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

__all__ = ["LayerMerge", "MergeReport", "compared", "precision_warnings"]


@dataclass(frozen=True)
class LayerMerge:
    """What merging did to one layer's update D = W' - W, given the stored weight.

    Attributes:
        name: the module.
        kept: share of D in the stored weight, <stored - W, D> / <D, D>; 1 is all of it.
        error: |stored - W - D| / |D|, Frobenius norms; 0 is exact.
        requantized: whether the stored weight is 4-bit.
        method: "dense", "plain" (rounded entry by entry), "compensated", or "unchanged" (the
            base's own codes: nothing else was better on the samples).
        output_error: |X (stored - W - D)ᵀ| / |X Dᵀ| on the held-out rows X of the samples; None
            without samples, or where none reached the layer.
        plain_output_error: the same for plain requantization; None without a 4-bit base too.
        trained_on: precision of the base that the adapters were trained on.
        merged_onto: precision of the base that they are merged onto.
    """

    name: str
    kept: float
    error: float
    requantized: bool
    method: str = "dense"
    output_error: float | None = None
    plain_output_error: float | None = None
    trained_on: str | None = None
    merged_onto: str | None = None


@dataclass(frozen=True)
class MergeReport:
    """What merging did; `print` it, or take `as_dict()`.

    Attributes:
        layers: one entry a layer.
        warnings: one line each: a base of another precision than the adapter was trained on, an
            update that did not survive.
        output_error: of the whole model: |merged - adapted| / |adapted - before| over its outputs
            on the held-out rows of the samples; None without samples or without such an output.
    """

    layers: tuple[LayerMerge, ...]
    warnings: tuple[str, ...] = ()
    output_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data: dictionaries, lists, text, numbers and None, fit for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "warnings": list(self.warnings),
            "output_error": self.output_error,
        }

    def __str__(self) -> str:
        four_bit = sum(layer.requantized for layer in self.layers)
        kept = [layer.kept for layer in self.layers]
        lines = [
            f"merged {len(self.layers)} layers, {four_bit} of them requantized to 4 bits",
            f"of the update {min(kept):.1%} to {max(kept):.1%} is in the stored weights",
        ]
        measured = [x.output_error for x in self.layers if x.output_error is not None]
        if measured:
            lines.append(
                f"output error on held-out samples, as a share of the update's effect: "
                f"{statistics.median(measured):.2g} in the median layer, {max(measured):.2g} at "
                "worst" + _whole(self.output_error)
            )
        lines += [f"warning: {line}" for line in self.warnings]
        shown = [x for x in self.layers if x.requantized or x.output_error is not None]
        return "\n".join(lines + _table(shown))


def _whole(error: float | None) -> str:
    return "" if error is None else f"; of the whole model {error:.2g}"


def _table(layers: list[LayerMerge]) -> list[str]:
    """Lines of a table, columns aligned; none without rows."""
    if not layers:
        return []
    rows = [("layer", "stored", "kept", "weight error", "output error", "plain's")]
    rows += [
        (
            layer.name or "this layer",
            layer.method,
            f"{layer.kept:.1%}",
            f"{layer.error:.1%}",
            _share(layer.output_error),
            _share(layer.plain_output_error),
        )
        for layer in layers
    ]
    if all(row[4] == "-" for row in rows[1:]):
        rows = [(*row[:4], "", "") for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _share(error: float | None) -> str:
    return "-" if error is None else f"{error:.1%}"


def compared(stored: Iterable[Tensor], wanted: Iterable[Tensor]) -> tuple[float, float]:
    """Compare the change that was stored with the one that was wanted.

    Args:
        stored: what was added to each parameter.
        wanted: what should have been.

    Returns:
        (kept, error) as in `LayerMerge`; (1, 0) where nothing was wanted.
    """
    inner = size = miss = 0.0
    for got, aim in zip(stored, wanted, strict=True):
        inner += float((got.double() * aim.double()).sum())
        size += float(aim.double().square().sum())
        miss += float((got.double() - aim.double()).square().sum())
    return (inner / size, (miss / size) ** 0.5) if size else (1.0, 0.0)


def precision_warnings(trained: Iterable[tuple[str, str | None, str | None]]) -> tuple[str, ...]:
    """Say where an adapter is merged onto another precision than it was trained on.

    Args:
        trained: (adapter, trained on, merged onto) for each adapter at each layer.

    Returns:
        One line for each combination that differs.
    """
    counts = Counter(entry for entry in trained if entry[1] and entry[2] and entry[1] != entry[2])
    return tuple(
        f"{name!r} was trained on a base in {before} and is merged onto one in {now} at {count} "
        "layers: it was fitted to the former's weights, so that the result is not the trained "
        "model; load the base as it was in training to merge what was trained"
        for (name, before, now), count in counts.items()
    )
