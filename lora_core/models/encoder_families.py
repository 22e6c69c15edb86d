"""Names and families of encoders, as data: what the sizes of a configuration do not say.

The name under which the trunk's weights lie, where positions begin, what the heads are made of. A
family that differs in these alone (XLM-RoBERTa, CamemBERT) is one row more.

Ref: Devlin et al. 2019 (BERT), arXiv:1810.04805; Liu et al. 2019 (RoBERTa), arXiv:1907.11692.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_core.models.reading import unknown

# a head -> how transformers' name of an architecture ends
HEADS = {
    "none": "Model",
    "masked": "ForMaskedLM",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}
LABELLED = ("sequence", "token", "span")
# what pretraining has beside the masked tokens' head is left out
_OTHER_NAMES = {"ForPreTraining": "masked"}


@dataclass(frozen=True)
class EncoderFamily:
    """What the sizes of a configuration do not say."""

    architecture: str
    """How its architectures' names begin."""
    prefix: str
    """Attribute that holds the trunk in a model with a head, and so the weights' prefix."""
    counts_tokens: bool
    """Whether positions are counted over ids other than padding, from the padding's id on."""
    pooled: bool
    """Whether the sequence head reads the trunk's pooler; else it has a dense layer of its own."""
    masked_head: str
    """Attribute that holds the masked-token head."""
    pad_token_id: int
    """The padding token of a config.json that names none."""


ENCODERS = {
    "bert": EncoderFamily("Bert", "bert", False, True, "cls", 0),
    "roberta": EncoderFamily("Roberta", "roberta", True, False, "lm_head", 1),
    "xlm-roberta": EncoderFamily("XLMRoberta", "roberta", True, False, "lm_head", 1),
    "camembert": EncoderFamily("Camembert", "roberta", True, False, "lm_head", 1),
}


def architectures() -> dict[str, tuple[str, str]]:
    """Every architecture's name -> (model_type, head)."""
    endings = {ending: head for head, ending in HEADS.items()} | _OTHER_NAMES
    return {
        family.architecture + ending: (kind, head)
        for kind, family in ENCODERS.items()
        for ending, head in endings.items()
        if ending not in _OTHER_NAMES or kind == "bert"
    }


def encoder_of(raw: Mapping[str, Any]) -> tuple[str, str | None]:
    """Family and head, by `model_type` and by `architectures`, which must not contradict it.

    Args:
        raw: config.json's content.

    Returns:
        (a key of `ENCODERS`, a key of `HEADS` or None where no architecture is named).

    Raises:
        ValueError: neither key, a name that is not known, or two that contradict each other.
    """
    kind, names, known = raw.get("model_type"), raw.get("architectures"), architectures()
    name = names[0] if isinstance(names, list) and names else names
    if kind is None and not name:
        raise ValueError("the key model_type is missing")
    if not name:
        if not isinstance(kind, str) or kind not in ENCODERS:
            raise ValueError(unknown("model_type", kind, ENCODERS))
        return kind, None
    if not isinstance(name, str) or name not in known:
        raise ValueError(unknown("architecture", name, known))
    told, head = known[name]
    if kind not in (None, told):
        raise ValueError(
            f"architectures names {name}, which is {told!r}, and model_type is {kind!r}: correct "
            "one of them"
        )
    return told, head
