"""Which tensor of a folder goes where in a model: everything is compared before anything is read.

`check_sizes` holds config.json's sizes against the headers before a model is built at all, so that
a wrong digit costs one line and not the machine's memory. `lay_out` then compares all names, shapes
and dtypes with the model on the meta device. What it returns is the list of what to read.

transformers builds what config.json says, loads what fits and initialises the rest at random, with
a warning. Here a tensor that is missing or left over is an error, except where a rule of names.py
or of the model says otherwise.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_core.checkpoint.bnb import Packed, names_of, packed_layers
from lora_core.checkpoint.names import Naming, Piece, matches, naming, pieces
from lora_core.checkpoint.safetensors_folder import DTYPES, Entry, SafetensorsFolder
from lora_core.targets import output_head_name

# last names of what other quantizations keep beside a weight
_SIGNS = (".qweight", ".SCB", ".weight_scale", ".absmax", ".weight_scale_inv")
_FLOATS = ("F64", "F32", "F16", "BF16")
# sizes of which a weight in the files has at least as many elements
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
)


@dataclass
class Layout:
    """What to read into a model."""

    dense: dict[str, list[Piece]]
    """{parameter: the tensors that make it up}, in the order of the files."""
    packed: dict[str, Packed]
    """{layer: its 4-bit weight's entries}."""
    fresh: list[str]
    """Parameters that the files lack and the model fills itself."""


def check_sizes(config: object, folder: SafetensorsFolder) -> None:
    """Refuse sizes for which the files cannot possibly hold the weights.

    Args:
        config: a dataclass with Hugging Face's names.
        folder: the open folder.

    Raises:
        ValueError: a size larger than all weights together, or more layers than tensors.
    """
    # a byte holds two weights of 4 bits
    most = sum(2 * entry.nbytes for entry in folder.entries.values())
    where = folder.directory / "config.json"
    for name in _SIZES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > most:
            raise ValueError(f"{where}: {name} is {value}, more than the files have weights in all")
    layers = getattr(config, "num_hidden_layers", 0)
    if layers > len(folder.entries):
        raise ValueError(
            f"{where}: num_hidden_layers is {layers}, but the files hold only "
            f"{len(folder.entries)} tensors in all"
        )


def build_empty(build: Callable[[Any], nn.Module], config: object, where: object) -> nn.Module:
    """Build a model without memory, on the meta device.

    Args:
        build: makes the model of its configuration.
        config: the configuration.
        where: the file it comes from, for the message.

    Raises:
        ValueError: sizes whose product is no tensor's.
    """
    try:
        with torch.device("meta"), _NoStart():
            return build(config)
    except (RuntimeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{where}: no model can have these sizes: {reason}") from None


class _NoStart(TorchFunctionMode):
    """Embeddings draw no first values, which nobody sees on the meta device.

    torch works out `normal_` there by its compiler's decompositions, and importing those takes more
    than a second, in every process that loads a model.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.init.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def tied_names(model: nn.Module) -> dict[str, str]:
    """{second name of a shared parameter: its first}: that of a tied head, the embedding's."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            tied[name] = known
    return tied


def kept_dense(model: nn.Module) -> set[str]:
    """Names of the linear layers that are not quantized on load: the head, and the model's own."""
    own: Iterable[str] = tuple(getattr(model, "kept_dense", ()))
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = output_head_name(model)
    return {name for name in linears if name == head or matches(own, name)}


def lay_out(
    model: nn.Module, folder: SafetensorsFolder, raw: Mapping[str, Any], is_packed: bool
) -> tuple[Layout, Naming]:
    """Compare all headers with the model and give the folder's tensors the model's names.

    Args:
        model: on the meta device.
        folder: the open folder; its tensors are renamed.
        raw: content of config.json.
        is_packed: whether it may hold 4-bit layers in bitsandbytes' format.

    Returns:
        What to read, and how the names came about.

    Raises:
        ValueError: a tensor that is missing, left over, or of another shape or dtype; a tied pair
            whose tensors differ.
    """
    names = naming(folder.entries, raw, model)
    tied = tied_names(model)
    for name, other in tied.items():  # of a tied pair either may be there
        if name in names.files and other not in names.files:
            names.files[other] = names.files.pop(name)
    folder.rename(names.files)
    packed = packed_layers(folder.entries) if is_packed else {}
    if is_packed and not packed:
        raise ValueError(
            f"{folder.directory}: config.json says that the weights are in 4 bits "
            "(quantization_config), but none in the files is: take that key out of it"
        )
    inside = {name for layer in packed.values() for name in names_of(layer)}
    found = {name: entry for name, entry in folder.entries.items() if name not in inside}
    dense = _wanted(model, folder)
    expected = {piece.name: piece.shape for parts in dense.values() for piece in parts}
    _take_packed(model, folder, packed, expected)
    tied = {name: other for name, other in tied.items() if name in found and other in expected}
    expected |= {name: expected[other] for name, other in tied.items()}
    missing = [name for name in expected if name not in found]
    fresh = [name for name in missing if matches(getattr(model, "fresh_if_absent", ()), name)]
    _check_names(model, folder, [name for name in missing if name not in fresh], found, expected)
    for name, entry in found.items():
        _check_entry(model, folder, name, entry, expected[name])
    _check_tied(folder, tied)
    reading = {p: [part for part in parts if part.name in found] for p, parts in dense.items()}
    ordered = sorted(
        ((parameter, parts) for parameter, parts in reading.items() if parts),
        key=lambda item: _position(folder, item[1][0]),
    )
    return Layout(dict(ordered), packed, fresh), names


def _wanted(model: nn.Module, folder: SafetensorsFolder) -> dict[str, list[Piece]]:
    """The tensors of every parameter; stacked experts may also lie there as they are in memory."""
    wanted: dict[str, list[Piece]] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        # an absurd number of experts is lacking as one tensor, not as so many
        whole = name in folder.entries or (len(shape) == 3 and shape[0] > len(folder.entries))
        wanted[name] = [Piece(name, shape)] if whole else pieces(name, shape)
    return wanted


def _take_packed(
    model: nn.Module,
    folder: SafetensorsFolder,
    packed: Mapping[str, Packed],
    expected: dict[str, tuple[int, ...]],
) -> None:
    """Strike the weights of 4-bit layers off what is expected to be dense."""
    modules = dict(model.named_modules())
    for name, layer in packed.items():
        # a linear layer, or one of stacked experts, which is no module of its own
        fits = isinstance(modules.get(name), nn.Linear) or name not in modules
        if not fits or expected.pop(f"{name}.weight", None) is None:
            raise ValueError(
                f"{folder.directory} holds a 4-bit {name}, which config.json has no place for"
            )
        for entry in (folder.entries[part] for part in names_of(layer)):
            if entry.dtype not in DTYPES:
                raise ValueError(
                    f"{folder.directory / entry.file}: tensor {entry.name} has dtype "
                    f"{entry.dtype}, which no part of a 4-bit weight has"
                )


def _check_names(
    model: nn.Module,
    folder: SafetensorsFolder,
    missing: list[str],
    found: Mapping[str, Entry],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    where = folder.directory
    if missing:
        tied = "; a tied head needs tie_word_embeddings in config.json"
        hint = tied if _head_weight(model) in missing else ""
        raise ValueError(f"{where} lacks {some(missing)}, which config.json calls for{hint}")
    if extra := [entry.name for name, entry in found.items() if name not in expected]:
        quantized = [name for name in extra if name.endswith(_SIGNS)]
        hint = "; it looks quantized, and config.json does not say how" if quantized else ""
        raise ValueError(f"{where} holds {some(extra)}, which config.json has no place for{hint}")


def _check_entry(
    model: nn.Module,
    folder: SafetensorsFolder,
    name: str,
    entry: Entry,
    shape: tuple[int, ...],
) -> None:
    where = folder.directory / entry.file
    if entry.shape != shape:
        raise ValueError(
            f"{where}: tensor {entry.name} has shape {entry.shape}; config.json calls for {shape}"
            f"{_vocabulary(model, name, entry.shape, shape)}"
        )
    if entry.dtype not in _FLOATS:
        raise ValueError(
            f"{where}: tensor {entry.name} has dtype {entry.dtype}; "
            f"weights must be one of {', '.join(_FLOATS)}"
        )


def _vocabulary(model: nn.Module, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """What to say beside a wrong shape that is a wrong vocabulary alone."""
    table = next((n for n, p in model.named_parameters() if p is embedding(model)), None)
    if name not in (table, _head_weight(model)) or found[1:] != shape[1:]:
        return ""
    return f": vocab_size is {shape[0]}, but the file has {found[0]} rows"


def _head_weight(model: Any) -> str | None:
    """Name of the weight that maps to the vocabulary."""
    head = model.get_output_embeddings()
    return next((f"{n}.weight" for n, m in model.named_modules() if m is head), None)


def embedding(model: Any) -> Tensor:
    """The weight of a model's token embedding."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _check_tied(folder: SafetensorsFolder, tied: Mapping[str, str]) -> None:
    for name, other in tied.items():
        if not torch.equal(folder.tensor(name), folder.tensor(other)):
            raise ValueError(
                f"{folder.directory}: config.json ties the head to the embedding, but {name} "
                f"differs from {other}; set tie_word_embeddings to false to use both"
            )


def _position(folder: SafetensorsFolder, piece: Piece) -> tuple[str, int]:
    """Where a tensor lies: disks read forwards."""
    entry = folder.entries[piece.name]
    return entry.file, entry.offset


def some(names: list[str]) -> str:
    """Name a few: `tensor a`, or `5 tensors (a, b, c, …)`."""
    if len(names) == 1:
        return f"tensor {names[0]}"
    return f"{len(names)} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
