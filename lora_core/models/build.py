"""One way in for every kind of model: config.json to a configuration, a configuration to a model.

Which kind it is, decoder or encoder, is told by `model_type` or the architecture's name; what is
known to neither is refused with the list of all that are. A further head or kind is a line here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.models.config import ModelConfig
from lora_core.models.decoder import CausalLM
from lora_core.models.encoder import Encoder, EncoderModel
from lora_core.models.encoder_config import EncoderConfig
from lora_core.models.encoder_families import ENCODERS, architectures
from lora_core.models.encoder_heads import MaskedLM, SequenceClassifier, SpanFinder, TokenClassifier
from lora_core.models.families import FAMILIES, WRAPPERS
from lora_core.models.reading import from_config_json, unknown

_HEADED = {
    "masked": MaskedLM,
    "sequence": SequenceClassifier,
    "span": SpanFinder,
    "token": TokenClassifier,
}


def read_config(directory: str | Path) -> ModelConfig | EncoderConfig:
    """Read `config.json` of a Hugging Face folder.

    Args:
        directory: the folder.

    Returns:
        The configuration of a decoder or of an encoder.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is no JSON object, or describes what this library cannot run.
        TypeError: a value in it is of the wrong type.
    """
    return from_config_json(directory, config_from)


def config_from(raw: Mapping[str, Any]) -> ModelConfig | EncoderConfig:
    """The configuration that config.json's content describes.

    Args:
        raw: the content.

    Returns:
        Of a decoder or of an encoder.

    Raises:
        ValueError: what neither is, a missing size, a value out of range.
        TypeError: a value of the wrong type.
    """
    kind, names = raw.get("model_type"), raw.get("architectures")
    name = next(iter(names), None) if isinstance(names, list) else names
    for key, value in (("model_type", kind), ("architectures", name)):
        if not isinstance(value, str | None):
            raise TypeError(f"{key} must be a name; got {value!r}")
    encoders = architectures()
    if kind in ENCODERS or (kind is None and name in encoders):
        return EncoderConfig.from_dict(raw)
    if kind is not None and kind not in FAMILIES and kind not in WRAPPERS:
        raise ValueError(unknown("model_type", kind, (*FAMILIES, *WRAPPERS, *ENCODERS)))
    decoders = {family.architecture for family in FAMILIES.values()}
    decoders |= {wrapper for wrapper, _ in WRAPPERS.values()}
    if kind is None and name and name not in decoders:
        raise ValueError(unknown("architecture", name, (*decoders, *encoders)))
    return ModelConfig.from_dict(raw)


def build_model(
    config: ModelConfig | EncoderConfig, *, head: str | None = None, num_labels: int | None = None
) -> CausalLM | EncoderModel:
    """A model of the shapes that a configuration describes; its weights are PyTorch's random ones.

    Args:
        config: of a decoder or of an encoder.
        head: what stands on an encoder: "none", "masked", "sequence", "token" or "span"; None: what
            the configuration says.
        num_labels: outputs of that head; None: what the configuration says.

    Returns:
        A `CausalLM`, or an encoder: `Encoder` without a head, else one of `MaskedLM`,
        `SequenceClassifier`, `TokenClassifier`, `SpanFinder`.

    Raises:
        ValueError: a head for a decoder, an unknown one, or labels for one that has none.
    """
    if isinstance(config, ModelConfig):
        if head is not None or num_labels is not None:
            raise ValueError(
                f"head and num_labels are for encoders ({', '.join(sorted(ENCODERS))}); "
                f"{config.model_type} is a decoder"
            )
        return CausalLM(config)
    wanted = config.with_head(head, num_labels)
    kind = _HEADED.get(wanted.head or "none")
    model = Encoder(wanted) if kind is None else kind(wanted)
    model.expect(config)
    return model
