"""How names in an encoder's files are the model's: what differs between checkpoints of one shape.

A folder holds the trunk with its prefix (`bert.encoder.…`), saved under a head, or without, saved
alone; very old files call a norm's weight and bias gamma and beta; position ids lie in some as if
they were weights. And a folder has one head, or that of pretraining, where another may be wanted:
its tensors are then left out and the wanted head is made afresh. All of it follows from two
configurations, the folder's and the model's, so it is data here, that the loader
(checkpoint/folder.py) applies to every tensor and tells the user about.

transformers decides by what it finds: whatever is absent is made afresh, under a warning. Here a
folder that says that it has a head and has not is an error; only a head that was asked for is made.
"""

from dataclasses import dataclass

from lora_core.models.encoder_config import EncoderConfig

_ATTRIBUTES = {"sequence": "classifier", "token": "classifier", "span": "qa_outputs"}


@dataclass(frozen=True)
class FileRules:
    """Regular expressions about names of tensors; see `file_rules`."""

    names_in_files: tuple[tuple[str, str], ...]
    """(expression, replacement), applied in order: names in the files to the model's."""
    unread_in_files: tuple[str, ...]
    """What follows from the configuration, and is passed over in silence."""
    left_out_in_files: tuple[str, ...]
    """What belongs to another head; also where this model has parameters of the same name."""
    fresh_if_absent: tuple[str, ...]
    """Parameters that are made afresh where the files lack them."""
    kept_dense: tuple[str, ...]
    """Modules that stay dense when a model is quantized as it loads: the head."""


def head_attribute(config: EncoderConfig) -> str | None:
    """Attribute of the model that holds the head, or None.

    Args:
        config: the model's.
    """
    return (
        config.family.masked_head if config.head == "masked" else _ATTRIBUTES.get(config.head or "")
    )


def has_pooler(config: EncoderConfig) -> bool:
    """Whether a model of this configuration has a pooler: without a head, and where one reads it.

    Args:
        config: the model's.
    """
    return config.head in (None, "none") or (config.head == "sequence" and config.family.pooled)


def file_rules(config: EncoderConfig, on_disk: EncoderConfig) -> FileRules:
    """How a folder's names are a model's.

    Args:
        config: the model's.
        on_disk: the folder's.

    Returns:
        The rules.
    """
    prefix, own = config.family.prefix, head_attribute(config)
    same_head = (config.head, config.num_labels) == (on_disk.head, on_disk.num_labels)
    if own is None:
        same_head = True
    trunk = "" if own is None else rf"{prefix}\."
    renamed = (
        (r"\.(LayerNorm|layer_norm)\.gamma$", r".\1.weight"),
        (
            r"\.(LayerNorm|layer_norm)\.beta$",
            r".\1.bias",
        ),
    )
    if own is None:
        prefixed = (rf"^{prefix}\.", "")
    else:
        prefixed = (r"^(?=(embeddings|encoder|pooler)\.)", f"{prefix}.")
    others = ["cls", "lm_head", "classifier", "qa_outputs"]
    if own is not None and (same_head or on_disk.head in (None, "none")):
        others.remove(own)
    left_out = [rf"{name}\..*" for name in others]
    if own == "cls":
        left_out.append(r"cls\.seq_relationship\..*")
    if not has_pooler(config):
        left_out.append(rf"{trunk}pooler\..*")
    fresh = [] if same_head else [rf"{own}\..*"]
    if has_pooler(config) and (own is None or not same_head):
        fresh.append(rf"{trunk}pooler\..*")
    return FileRules(
        names_in_files=(*renamed, prefixed),
        unread_in_files=(rf"{trunk}embeddings\.(position_ids|token_type_ids)",),
        left_out_in_files=tuple(left_out),
        fresh_if_absent=tuple(fresh),
        kept_dense=(rf"{own}(\..*)?",) if config.head in _ATTRIBUTES else (),
    )
