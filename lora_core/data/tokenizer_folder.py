"""Read a tokenizer's files from a Hugging Face folder.

`tokenizer.json` holds the algorithm. The other files name things: special tokens (strings or
objects), tokens to add, the chat templates (files, a string, or a list of named ones) and the ids
that end a generation. Files that are there but wrong are errors; files that are absent are not:
in a model folder with tokenizer.json alone, config.json's ids say which special tokens begin and
end a text, or its chats would lose the BOS that a template writes.

One file is forgiven: published checkpoints have a generation_config.json that is not JSON (a comma
too many). It says how to sample; all that is read here are its stop tokens, and config.json and the
template name those too. A warning says so.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.data.tokenizer import NAMED_TOKENS, TEMPLATE_FILE, TEMPLATE_FOLDER, Tokenizer


class NotJSONError(ValueError):
    """A file that should hold JSON does not."""


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read a tokenizer from a Hugging Face folder.

    Args:
        directory: holds tokenizer.json and, where there are any, tokenizer_config.json,
            special_tokens_map.json, chat_template.jinja, additional_chat_templates/NAME.jinja,
            generation_config.json, config.json.

    Returns:
        A `Tokenizer`. Its chat templates are the files if there are any, else the entry of
        tokenizer_config.json, else that of chat_template.json (older multimodal folders).

    Raises:
        FileNotFoundError: no such folder, or no tokenizer.json in it.
        ValueError: a file is not valid JSON, the files contradict each other, or the vocabulary is
            empty.
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
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: not a readable tokenizer.json: {reason}") from None
    if not backend.get_vocab_size(with_added_tokens=False):
        raise ValueError(f"{file}: the vocabulary is empty; the file was cut or is a placeholder")
    config = {**_read_json(folder, "special_tokens_map.json")}
    config.update(_read_json(folder, "tokenizer_config.json"))
    _check_named_tokens(config, folder)
    _add_declared_tokens(backend, config, folder)
    _check_post_processor(backend, file)
    config = config or _named_by_id(backend, folder)
    tok = Tokenizer(backend, config, _read_templates(folder, config))
    tok.stop_ids = tuple(_read_stop_ids(folder, tok.vocab_size))
    return tok


def _no_tokenizer(folder: Path) -> str:
    if any((folder / name).exists() for name in ("tokenizer.model", "vocab.json", "spiece.model")):
        return (
            f"{str(folder)!r} has no tokenizer.json, only an older tokenizer format; convert it "
            "once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return f"{str(folder)!r} has no tokenizer.json; copy the tokenizer's files into the folder"


def _check_post_processor(backend: Any, file: Path) -> None:
    """Refuse a template around texts whose tokens are not declared: the Rust code would panic."""
    processor = backend.post_processor
    spec = {} if processor is None else json.loads(processor.__getstate__())
    for step in spec.get("processors", [spec]):
        pieces = [piece for form in ("single", "pair") for piece in step.get(form, [])]
        used = {piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece}
        declared = step.get("special_tokens", {})
        ids = [index for entry in declared.values() for index in entry["ids"]]
        for name in sorted(used - declared.keys()):
            raise ValueError(
                f"{file}: the post_processor writes {name!r}, which its special_tokens do not list"
            )
        for index in ids:
            if backend.id_to_token(index) is None:
                raise ValueError(
                    f"{file}: the post_processor writes id {index}, which has no token"
                )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors both
        raise NotJSONError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object; got {type(content).__name__}")
    return content


def _check_named_tokens(config: Mapping[str, Any], folder: Path) -> None:
    """A special token is text, an object with its text as `content`, or null."""
    for name in NAMED_TOKENS:
        entry = config.get(name)
        text = entry.get("content") if isinstance(entry, dict) else entry
        if not (entry is None or isinstance(text, str)):
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: {name} must be a string, an object with a "
                f"string 'content', or null; got {entry!r}"
            )


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name; the one without a name is "default"."""
    file = folder / TEMPLATE_FILE
    found = {file.stem: file for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    if file.is_file():
        found["default"] = file
    if found:
        return _with_default({name: _read_text(path) for name, path in found.items()}, folder)
    for name in ("tokenizer_config.json", "chat_template.json"):
        content = config if name == "tokenizer_config.json" else _read_json(folder, name)
        if content.get("chat_template") is not None:
            return _named_templates(content["chat_template"], folder / name)
    return {}


def _named_templates(entry: object, file: Path) -> dict[str, str]:
    if isinstance(entry, str):
        return {"default": entry}
    if isinstance(entry, dict):
        named = entry
    elif isinstance(entry, list) and all(isinstance(item, dict) for item in entry):
        named = {item.get("name"): item.get("template") for item in entry}
    else:
        raise ValueError(
            f"{file}: chat_template must be a string or a list of {{name, template}}; "
            f"got {type(entry).__name__}"
        )
    for name, text in named.items():
        if not isinstance(text, str) or Path(str(name)).name != name:
            raise ValueError(
                f"{file}: chat_template maps plain names to text; got {name!r}: {text!r:.40}"
            )
    return _with_default(named, file)


def _with_default(named: dict[str, str], where: Path) -> dict[str, str]:
    if "default" not in named:
        raise ValueError(
            f"{where}: chat_template has no 'default' among {sorted(map(str, named))}; "
            "pass template= with the one to use"
        )
    return named


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from None


def _read_stop_ids(folder: Path, vocab_size: int) -> list[int]:
    """eos_token_id of generation_config.json, which may be a list; else config.json's."""
    name = "generation_config.json"
    try:
        entry = _read_json(folder, name).get("eos_token_id")
    except NotJSONError as error:
        warnings.warn(f"{error}; its stop tokens are not used", stacklevel=3)
        entry = None
    if entry is None:
        name = "config.json"
        entry = _read_json(folder, name).get("eos_token_id")
    ids = entry if isinstance(entry, list) else [] if entry is None else [entry]
    if not all(type(index) is int for index in ids):
        raise ValueError(
            f"{folder / name}: eos_token_id must be an id or a list of ids; got {entry!r}"
        )
    strange = [index for index in ids if not 0 <= index < vocab_size]
    if strange:
        raise ValueError(
            f"{folder / name}: eos_token_id {strange[0]} is no id of the tokenizer, which has "
            f"{vocab_size}; correct it, or take the tokenizer that belongs to the model"
        )
    return ids


def _add_declared_tokens(backend: Any, config: Mapping[str, Any], folder: Path) -> None:
    """Add what `added_tokens_decoder` declares and tokenizer.json lacks, at the declared ids."""
    from tokenizers import AddedToken

    file = folder / "tokenizer_config.json"
    declared = config.get("added_tokens_decoder") or {}
    try:
        tokens = sorted((int(key), fields["content"], key) for key, fields in declared.items())
    except (AttributeError, TypeError, KeyError, ValueError):
        tokens = [(0, None, "")]
    if not all(isinstance(content, str) for _, content, _ in tokens):
        raise ValueError(f"{file}: added_tokens_decoder must map ids to objects with a 'content'")
    for index, content, key in tokens:
        if backend.token_to_id(content) is None:
            fields = {k: v for k, v in declared[key].items() if k != "__type"}
            try:
                backend.add_tokens([AddedToken(**fields)])
            except TypeError as error:
                raise ValueError(f"{file}: added token {content!r}: {error}") from None
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
