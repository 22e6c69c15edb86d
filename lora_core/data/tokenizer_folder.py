"""Read a tokenizer's files from a Hugging Face folder.

`tokenizer.json` holds the algorithm. The other files name things: special tokens (strings or
objects), tokens to add, the chat template (a file, a string, or a list of named ones) and the ids
that end a generation. Files that are there but wrong are errors; files that are absent are not:
in a model folder with tokenizer.json alone, config.json's ids say which special tokens begin and
end a text, or its chats would lose the BOS that a template writes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.data.tokenizer import Tokenizer


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read a tokenizer from a Hugging Face folder.

    Args:
        directory: holds tokenizer.json and, where there are any, tokenizer_config.json,
            special_tokens_map.json, chat_template.jinja, generation_config.json, config.json.

    Returns:
        A `Tokenizer`. Its chat template is chat_template.jinja if that file exists, else the entry
        of tokenizer_config.json (of several named ones, `default`).

    Raises:
        FileNotFoundError: no such folder, or no tokenizer.json in it.
        ValueError: a file is not valid JSON, or the files contradict each other.
    """
    from tokenizers import Tokenizer as Backend

    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r} to read a tokenizer from")
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(_no_tokenizer(folder))
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the Rust library raises plain Exception
        raise ValueError(f"{file}: not a readable tokenizer.json: {error}") from None
    config = {**_read_json(folder, "special_tokens_map.json")}
    config.update(_read_json(folder, "tokenizer_config.json"))
    _add_declared_tokens(backend, config, folder)
    config = config or _named_by_id(backend, folder)
    return Tokenizer(backend, config, _read_template(folder, config), _read_stop_ids(folder))


def _no_tokenizer(folder: Path) -> str:
    if any((folder / name).exists() for name in ("tokenizer.model", "vocab.json", "spiece.model")):
        return (
            f"{str(folder)!r} has no tokenizer.json, only an older tokenizer format; convert it "
            "once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return f"{str(folder)!r} has no tokenizer.json; copy the tokenizer's files into the folder"


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 errors both
        raise ValueError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object; got {type(content).__name__}")
    return content


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    entry = config.get("chat_template")
    if entry is None or isinstance(entry, str):
        return entry
    if isinstance(entry, dict):
        named = entry
    elif isinstance(entry, list) and all(isinstance(item, dict) for item in entry):
        named = {item.get("name"): item.get("template") for item in entry}
    else:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of "
            f"{{name, template}}; got {type(entry).__name__}"
        )
    if "default" not in named:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template has no 'default' among "
            f"{sorted(map(str, named))}; pass template= with the one to use"
        )
    return str(named["default"])


def _read_stop_ids(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, which may be a list; else config.json's."""
    generation = _read_json(folder, "generation_config.json")
    entry = generation.get("eos_token_id")
    if entry is None:
        entry = _read_json(folder, "config.json").get("eos_token_id")
    ids = entry if isinstance(entry, list) else [] if entry is None else [entry]
    if not all(type(index) is int for index in ids):
        raise ValueError(f"{folder}: eos_token_id must be an id or a list of ids; got {entry!r}")
    return ids


def _add_declared_tokens(backend: Any, config: Mapping[str, Any], folder: Path) -> None:
    """Add what `added_tokens_decoder` declares and tokenizer.json lacks, at the declared ids."""
    from tokenizers import AddedToken

    file = folder / "tokenizer_config.json"
    declared = config.get("added_tokens_decoder") or {}
    try:
        tokens = sorted((int(key), str(fields["content"]), key) for key, fields in declared.items())
    except (AttributeError, TypeError, KeyError, ValueError):
        raise ValueError(
            f"{file}: added_tokens_decoder must map ids to objects with a 'content'"
        ) from None
    for index, content, key in tokens:
        if backend.token_to_id(content) is None:
            fields = {k: v for k, v in declared[key].items() if k != "__type"}
            backend.add_tokens([AddedToken(**fields)])
        if backend.token_to_id(content) != index:
            raise ValueError(
                f"{file}: added token {content!r} should have id {index}, tokenizer.json gives "
                f"{backend.token_to_id(content)}"
            )


def _named_by_id(backend: Any, folder: Path) -> dict[str, str]:
    """The special tokens that config.json's ids mean, where they are special tokens at all."""
    model, named = _read_json(folder, "config.json"), {}
    tokens = backend.get_added_tokens_decoder()
    for name in ("bos_token", "eos_token", "pad_token"):
        entry = model.get(f"{name}_id")
        index = entry[0] if isinstance(entry, list) and entry else entry
        token = tokens.get(index) if isinstance(index, int) else None
        if token is not None and token.special:
            named[name] = token.content
    return named
