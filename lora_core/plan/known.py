"""Model sizes by name, and any other from its config.json.

The built-in ones are data: models.json holds the numbers that their makers published.
"""

import json
from pathlib import Path

from lora_core.models import ModelConfig

__all__ = ["known_models", "model_named"]

_FILE = Path(__file__).with_name("models.json")


def known_models() -> dict[str, tuple[str, ModelConfig]]:
    """The built-in sizes: {name: (the model it is, its configuration)}."""
    entries = json.loads(_FILE.read_text(encoding="utf-8"))
    return {
        name: (entry["of"], ModelConfig.from_dict(entry["config"]))
        for name, entry in entries.items()
    }


def model_named(name: str) -> ModelConfig:
    """The configuration of a built-in size, of a folder, or of a config.json.

    Args:
        name: "8B" in any case, a Hugging Face folder, or the path of its config.json.

    Returns:
        The configuration.

    Raises:
        ValueError: neither, or a config.json that this library does not run.
    """
    known = known_models()
    if name.upper() in known:
        return known[name.upper()][1]
    path = Path(name)
    if path.is_file():
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ValueError(f"{path} must hold a JSON object; got {type(raw).__name__}")
        try:
            return ModelConfig.from_dict(raw)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None
    if path.is_dir():
        return ModelConfig.from_folder(path)
    raise ValueError(
        f"no model {name!r}: give one of {', '.join(known)}, a Hugging Face folder, or a "
        "config.json"
    )
