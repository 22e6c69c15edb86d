"""From the names of tensors in files to the names of parameters in a model, and back.

Most folders need nothing: the models here keep Hugging Face's names. What remains is two small
tables instead of a conversion script a family:

* `RENAMED`, `LEFT_OUT`, `FOLLOWS`: regular expressions on names. They unwrap the text part of a
  multimodal model, put back the prefix that a bare trunk lacks, and name what is not read: the
  vision part, which the reader tells of, and old rotary frequencies, which follow from the
  configuration. A model may add rules of its own (`names_in_files`, `unread_in_files`,
  `left_out_in_files`); they are plain data, since models know nothing of files.
* `STACKED`: parameters that are many tensors on disk. Experts lie there one matrix each
  (`experts.0.gate_proj.weight`), while in memory, as in transformers 5, all of a layer are one
  tensor, so that one product serves them: `experts.gate_up_proj` (E, 2 I, C), gate's rows over
  up's, and `experts.down_proj` (E, C, I). `pieces` says which tensor fills which region; reading
  and writing both follow it.

transformers converts whole tensors through a graph of operations (merge, concatenate, …) that is
declared per family and run in threads. A region of a parameter says the same with an index, can be
filled tensor by tensor as the files stream, and is its own inverse when saving.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rule = tuple[str, str]
"""A regular expression, and what `re.sub` puts in its place."""

# multimodal wrappers: how the text part is called in older files and in newer ones
UNWRAPPED: tuple[Rule, ...] = (
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^model\.language_model\.", "model."),
)
# and their other parts, left out
OTHER_PARTS = (
    r"(model\.)?vision_tower\..*",
    r"(model\.)?multi_modal_projector\..*",
)
# a trunk saved without its head: `layers.0…` instead of `model.layers.0…`
BARE: Rule = (r"^(?=embed_tokens\.|layers\.|norm\.)", "model.")
# old files carry the rotary frequencies, which follow from the configuration
FOLLOWS = (r".*\.rotary_emb\.inv_freq",)
# a parameter's last name -> the matrices whose rows make up one expert's part of it
STACKED: dict[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


@dataclass(frozen=True)
class Piece:
    """A tensor in the files and the region of a parameter that it fills."""

    name: str
    """On disk."""
    shape: tuple[int, ...]
    """Sizes on disk."""
    where: tuple[int | slice, ...] = ()
    """Index into the parameter; () for the whole."""

    @property
    def layer(self) -> str:
        """Name of the layer whose weight it is."""
        return self.name.removesuffix(".weight")


def pieces(name: str, shape: tuple[int, ...]) -> list[Piece]:
    """The tensors on disk that make up one parameter, in order.

    Args:
        name: of the parameter in the model.
        shape: its sizes.

    Returns:
        One piece, the parameter itself; or, for stacked experts (E, N, K), one or two an expert.
    """
    owner, _, last = name.rpartition(".")
    parts = STACKED.get(last, ())
    if len(shape) != 3 or not parts or shape[1] % len(parts):
        return [Piece(name, shape)]
    experts, rows, columns = shape
    step = rows // len(parts)
    return [
        Piece(
            f"{owner}.{expert}.{part}.weight",
            (step, columns),
            (expert, slice(step * number, step * (number + 1))),
        )
        for expert in range(experts)
        for number, part in enumerate(parts)
    ]


@dataclass(frozen=True)
class Naming:
    """What each tensor of a folder is called in the model."""

    files: dict[str, str]
    """{name in the model: name in the files}, in the order of the files."""
    left_out: tuple[str, ...]
    """Tensors that are not read although they hold something, by their names in the files."""


def naming(names: Iterable[str], raw: Mapping[str, Any], model: object) -> Naming:
    """Apply the rules to a folder's names.

    Args:
        names: of all tensors in the files.
        raw: content of config.json; one with a `text_config` is a multimodal wrapper's.
        model: the model, which may have rules of its own.

    Returns:
        The names in the model. A tensor that no rule knows keeps its name.

    Raises:
        ValueError: two tensors that would be one.
    """
    names = list(names)
    wrapped = isinstance(raw.get("text_config"), Mapping)
    left_out = [*(OTHER_PARTS if wrapped else ()), *_own(model, "left_out_in_files")]
    follows = [*FOLLOWS, *_own(model, "unread_in_files")]
    rules = [*(UNWRAPPED if wrapped else ()), *_own(model, "names_in_files")]
    if not any(name.startswith("model.") for name in names):
        rules.append(BARE)
    files: dict[str, str] = {}
    dropped: list[str] = []
    for name in names:
        renamed = name
        for pattern, replacement in rules:
            renamed = re.sub(pattern, replacement, renamed)
        if matches(follows, renamed):
            continue
        if matches(left_out, renamed):
            dropped.append(name)
        elif renamed in files:
            raise ValueError(
                f"tensors {files[renamed]} and {name} are both {renamed} of the model: which one "
                "counts is not said"
            )
        else:
            files[renamed] = name
    return Naming(files, tuple(dropped))


def _own(model: object, attribute: str) -> Sequence[Any]:
    return tuple(getattr(model, attribute, ()))


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether one of the regular expressions is the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)
