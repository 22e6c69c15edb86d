"""load_tokenizer reads what real folders hold, and says in one line what is missing."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import SFTDataset, Tokenizer, load_tokenizer
from lora_core.data.tokenizer import NAMED_TOKENS

SPECIALS = ["<pad>", "<s>", "</s>", "<end>"]


@pytest.fixture
def folder(tmp_path: Path, backend: Callable[..., Any]) -> Callable[..., Path]:
    """Write tokenizer.json and further JSON (or text) files."""

    def write(made: Any = None, **files: Any) -> Path:
        (made or backend(SPECIALS)).save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            suffix = ".json" if not isinstance(content, str) else ""
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / (name.replace("__", ".") + suffix)).write_text(text)
        return tmp_path

    return write


def test_shared_fixture_folder(tokenizer_folder: Path) -> None:
    tok = load_tokenizer(tokenizer_folder)
    assert (tok.vocab_size, len(tok), tok.pad_id, tok.eos_ids) == (400, 400, 0, [2])
    text = tok.render([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    # trim_blocks takes the line break after the block tag, as it does in transformers
    assert text == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"


@given(text=st.text())
def test_round_trip(families: dict[str, Tokenizer], text: str) -> None:
    tok = families["chatml"]
    assert tok.decode(tok.encode(text)) == text
    ids, offsets = tok.encode_with_offsets(text)
    assert ids == tok.encode(text)
    assert len(ids) == len(offsets)


def test_special_tokens_as_strings_or_objects(folder: Callable[..., Path]) -> None:
    entry = {"content": "</s>", "lstrip": False, "__type": "AddedToken"}
    tok = load_tokenizer(
        folder(
            tokenizer_config={"eos_token": entry, "unk_token": None},
            special_tokens_map={"bos_token": "<s>", "eos_token": "<pad>", "pad_token": "<pad>"},
        )
    )
    assert tok.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (1, 2, 0)


def test_eos_ids_join_the_three_sources(folder: Callable[..., Path]) -> None:
    template = "{% for m in messages %}{{ m.content }}<end>\n{% endfor %}"
    tok = load_tokenizer(
        folder(
            tokenizer_config={"eos_token": "</s>", "chat_template": template},
            generation_config={"eos_token_id": [0, 2]},
        )
    )
    assert tok.eos_ids == [0, 2, 3]
    tok.chat_template = None
    assert tok.eos_ids == [0, 2]


def test_eos_of_config_json_counts_without_generation_config(folder: Callable[..., Path]) -> None:
    assert load_tokenizer(folder(config={"eos_token_id": 3})).eos_ids == [3]


def test_a_model_folder_with_tokenizer_json_alone(folder: Callable[..., Path]) -> None:
    ids = {"bos_token_id": 1, "eos_token_id": [3, 2], "pad_token_id": 60}
    tok = load_tokenizer(folder(config=ids))
    assert tok.special_tokens == {"bos_token": "<s>", "eos_token": "<end>"}  # 60 is a letter
    ds = SFTDataset([{"instruction": "add", "output": "two"}], tok, template="alpaca")
    assert (ds[0]["input_ids"][0], ds[0]["labels"][-1]) == (1, 3)
    named = {"bos_token": None, "eos_token": "</s>"}  # what the tokenizer says goes first
    tok = load_tokenizer(folder(config=ids, tokenizer_config=named))
    assert tok.special_tokens == {"eos_token": "</s>"}


def test_pad_falls_back_to_eos_then_zero(folder: Callable[..., Path]) -> None:
    directory = folder(tokenizer_config={"eos_token": "</s>"})
    assert load_tokenizer(directory).pad_id == 2
    (directory / "tokenizer_config.json").unlink()
    tok = load_tokenizer(directory)
    assert (tok.pad_id, tok.eos_id, tok.bos_id, tok.eos_ids) == (0, None, None, [])


@pytest.mark.parametrize(
    "entry",
    [
        "{{ 1 }}",
        [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ 1 }}"}],
        {"default": "{{ 1 }}"},
    ],
)
def test_template_entries(folder: Callable[..., Path], entry: object) -> None:
    tok = load_tokenizer(folder(tokenizer_config={"chat_template": entry}))
    assert tok.render([{"role": "user", "content": "q"}]) == "1"


def test_template_file_goes_before_the_entry(folder: Callable[..., Path]) -> None:
    directory = folder(tokenizer_config={"chat_template": "old"}, chat_template__jinja="new")
    assert load_tokenizer(directory).chat_template == "new"


def test_declared_tokens_are_added_at_their_ids(folder: Callable[..., Path]) -> None:
    size = load_tokenizer(folder()).vocab_size
    declared = {str(size): {"content": "<new>", "special": True, "lstrip": False}}
    tok = load_tokenizer(folder(tokenizer_config={"added_tokens_decoder": declared}))
    assert tok.encode("a<new>") == [*tok.encode("a"), size]
    assert tok.control_tokens[size] == "<new>"
    wrong = {str(size + 5): declared[str(size)]}
    with pytest.raises(ValueError, match=f"'<new>' should have id {size + 5}"):
        load_tokenizer(folder(tokenizer_config={"added_tokens_decoder": wrong}))


def test_truncation_and_padding_of_the_file_are_off(
    folder: Callable[..., Path], backend: Callable[..., Any]
) -> None:
    made = backend(SPECIALS)
    made.enable_truncation(4)
    made.enable_padding(length=64)
    tok = load_tokenizer(folder(made))
    text = "once upon a time there was a file"
    assert tok.decode(tok.encode(text)) == text


def test_offsets_keep_leading_spaces(
    folder: Callable[..., Path], backend: Callable[..., Any], tmp_path: Path
) -> None:
    made = backend(SPECIALS, trim_offsets=True)
    assert made.encode("a time").offsets[1][0] == 2  # the file's own setting cuts the space off
    tok = load_tokenizer(folder(made))
    assert tok.encode_with_offsets("a time")[1][1][0] == 1
    tok.save(tmp_path / "saved")
    spec = json.loads((tmp_path / "saved/tokenizer.json").read_text())
    assert spec["post_processor"]["trim_offsets"] is True  # saved as it was
    assert tok.encode_with_offsets("a time")[1][1][0] == 1


def test_prefix_ids_are_what_the_tokenizer_adds(
    folder: Callable[..., Path], backend: Callable[..., Any]
) -> None:
    from tokenizers import processors

    made = backend(SPECIALS)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tok = load_tokenizer(folder(made, tokenizer_config={"bos_token": "<s>"}))
    assert tok.prefix_ids == [1]
    assert tok.encode("a") == tok.encode("a", add_special_tokens=True)[1:]
    assert tok.encode_prompt("a") == [1, *tok.encode("a")]
    assert tok.encode_prompt("<s>a") == [1, *tok.encode("a")]
    assert load_tokenizer(folder(backend(SPECIALS))).prefix_ids == []


def test_prompt_of_messages_goes_through_the_template(tok: Tokenizer) -> None:
    messages = [{"role": "user", "content": "q"}]
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert tok.encode_prompt(messages) == tok.encode(text)


def test_add_tokens_and_save(folder: Callable[..., Path], tmp_path: Path) -> None:
    tok = load_tokenizer(folder(tokenizer_config={"eos_token": "</s>", "model_max_length": 8}))
    size = tok.vocab_size
    assert not tok.is_token("<|im_start|>")
    assert tok.add_tokens(["<|im_start|>", "</s>", "<|im_end|>", "<|im_end|>"]) == [size, size + 1]
    assert tok.is_token("<|im_start|>")
    assert tok.vocab_size == size + 2
    tok.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tok.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.encode("x<|im_end|>") == tok.encode("x<|im_end|>") == [*tok.encode("x"), size + 1]
    assert again.chat_template == tok.chat_template
    assert again.config["model_max_length"] == 8
    assert again.eos_ids == [2, size + 1]
    tok.chat_template = None
    tok.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template is None


def test_copies_and_pickles(families: dict[str, Tokenizer]) -> None:
    tok = families["llama3"]
    for twin in (copy.deepcopy(tok), pickle.loads(pickle.dumps(tok))):
        assert twin.encode("a<|eot_id|>") == tok.encode("a<|eot_id|>")
        assert twin.eos_ids == tok.eos_ids
        twin.add_tokens(["<|extra|>"])
    assert not tok.is_token("<|extra|>")


@pytest.mark.oracle
def test_transformers_reads_what_is_saved(
    oracle: Callable[[str], ModuleType], families: dict[str, Tokenizer], tmp_path: Path
) -> None:
    transformers = oracle("transformers")
    messages = [{"role": "user", "content": "what is a function?"}]
    for name, tok in families.items():
        tok.save(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert theirs.eos_token_id == tok.eos_id
        assert theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        ) == (tok.encode_prompt(messages))


def test_errors(folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere' to read a tokenizer from"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json; copy"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="only an older tokenizer format; convert it once"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": []}, r"tokenizer_config\.json: expected a JSON object; got list"),
        ({"tokenizer__json": '{"a\n'}, r"not a readable tokenizer\.json: .* line 2 "),
        ({"tokenizer_config__json": "{"}, r"tokenizer_config\.json: not valid JSON"),
        ({"tokenizer_config__json": "[" * 100_000}, r"tokenizer_config\.json: not valid JSON"),
        ({"generation_config": 3}, r"generation_config\.json: expected a JSON object; got int"),
        *(
            ({name: {"eos_token_id": value}}, rf"{name}\.json: eos_token_id {message}")
            for name in ("config", "generation_config")
            for value, message in [
                (["2"], r"must be an id or a list of ids; got \['2'\]"),
                (2.0, r"must be an id or a list of ids; got 2\.0"),
                (True, "must be an id or a list of ids; got True"),
                (-1, r"-1 is no id of the tokenizer, which has \d+; correct it"),
                ([2, 100_000], "100000 is no id of the tokenizer, which has"),
            ]
        ),
        *(
            ({"tokenizer_config": {name: "<none>"}}, f"names {name} '<none>', which is not in")
            for name in NAMED_TOKENS
        ),
        ({"tokenizer_config": {"pad_token": 3}}, r"pad_token must be a string, an object .*got 3"),
        ({"tokenizer_config": {"unk_token": {"id": 1}}}, r"unk_token must be .*got \{'id': 1\}"),
        ({"tokenizer_config": {"chat_template": {"default": 3}}}, "names to text; got 'default'"),
        ({"tokenizer_config": {"chat_template": {"../x": ""}}}, r"names to text; got '\.\./x'"),
        ({"tokenizer_config": {"chat_template": 3}}, "must be a string or a list .*; got int"),
        (
            {"tokenizer_config": {"chat_template": [{"name": "rag", "template": ""}]}},
            r"no 'default' among \['rag'\]",
        ),
        *(
            ({"tokenizer_config": {"added_tokens_decoder": declared}}, "must map ids to objects")
            for declared in (
                [1],
                {"5": {}},
                {"five": {"content": "x"}},
                {"5": None},
                {"5": {"content": 3}},
            )
        ),
        *(
            ({"tokenizer_config": {"added_tokens_decoder": {"999": fields}}}, "not an instance of")
            for fields in ({"content": "<x>", "special": "yes"}, {"content": "<x>", "lstrip": 2})
        ),
    ],
)
def test_errors_in_files(folder: Callable[..., Path], files: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder(**files))


def test_an_invalid_generation_config_is_forgiven(folder: Callable[..., Path]) -> None:
    """Published checkpoints have one; config.json and the template say the same."""
    files = {"generation_config__json": '{"eos_token_id": [1],}', "config": {"eos_token_id": 3}}
    with pytest.warns(UserWarning, match=r"generation_config\.json: not valid JSON: .*not used"):
        tok = load_tokenizer(folder(**files))
    assert tok.eos_ids == [3]


def test_empty_vocabulary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    made = Backend(models.BPE())
    made.add_special_tokens(["<s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: the vocabulary is empty"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "ids", "message"),
    [
        ({}, [1], r"post_processor writes '<s>', which its special_tokens do not list"),
        (None, [99_999], r"post_processor writes id 99999, which has no token"),
    ],
)
def test_what_is_put_around_a_text_must_exist(
    folder: Callable[..., Path],
    backend: Callable[..., Any],
    tokens: dict[str, Any] | None,
    ids: list[int],
    message: str,
) -> None:
    directory = folder(backend(SPECIALS))
    spec = json.loads((directory / "tokenizer.json").read_text())
    entry = {"<s>": {"id": "<s>", "ids": ids, "tokens": ["<s>"]}}
    single = [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": entry if tokens is None else tokens,
    }
    for step in (template, {"type": "Sequence", "processors": [template]}):
        spec["post_processor"] = step
        (directory / "tokenizer.json").write_text(json.dumps(spec))
        with pytest.raises(ValueError, match=message):
            load_tokenizer(directory)


def test_special_tokens_that_are_empty(folder: Callable[..., Path]) -> None:
    """An empty text is defined in a template, unlike null, and names no token."""
    tok = load_tokenizer(folder(tokenizer_config={"bos_token": "", "eos_token": "</s>"}))
    assert (tok.bos_id, tok.eos_ids) == (None, [2])
    tok.chat_template = "{{ bos_token is defined }} {{ pad_token is defined }}"
    assert tok.render([{"role": "user", "content": "q"}]) == "True False"


def test_templates_by_name(folder: Callable[..., Path], tmp_path: Path) -> None:
    message = [{"role": "user", "content": "q"}]
    named = {"default": "plain", "tool_use": "tools {{ tools | length }}"}
    tok = load_tokenizer(folder(tokenizer_config={"chat_template": named}))
    assert (tok.chat_template, tok.render(message)) == ("plain", "plain")
    assert tok.render(message, tools=[{"name": "f"}]) == "tools 1"
    tok.save(tmp_path / "saved")
    (tmp_path / "saved/tokenizer_config.json").write_text("{}")  # the files are enough
    assert load_tokenizer(tmp_path / "saved").templates == named
    tok.chat_template = "one"
    assert tok.render(message, tools=[{"name": "f"}]) == "one"
    tok.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").templates == {"default": "one"}
    (tmp_path / "saved/additional_chat_templates").mkdir(exist_ok=True)
    (tmp_path / "saved/additional_chat_templates/rag.jinja").write_text("r")
    (tmp_path / "saved/chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"chat_template has no 'default' among \['rag'\]"):
        load_tokenizer(tmp_path / "saved")


def test_template_of_an_older_multimodal_folder(folder: Callable[..., Path]) -> None:
    directory = folder(chat_template={"chat_template": "old"})
    assert load_tokenizer(directory).chat_template == "old"
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not UTF-8 text"):
        load_tokenizer(directory)


def test_no_template(folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="the tokenizer has no chat template; set tok"):
        load_tokenizer(folder()).render([{"role": "user", "content": "q"}])
    with pytest.raises(ValueError, match="renders at least one message; got none"):
        load_tokenizer(folder(chat_template__jinja="x")).render([])


def test_what_cannot_be_encoded(tokenizer_folder: Path) -> None:
    tok = load_tokenizer(tokenizer_folder)
    broken = b"caf\xe9".decode(errors="surrogateescape")
    for encode in (tok.encode, tok.encode_with_offsets):
        with pytest.raises(ValueError, match=r"not valid Unicode: '\\udce9' at character 3, as"):
            encode(broken)
        with pytest.raises(TypeError, match="only text can be encoded; got 5"):
            encode(5)  # type: ignore[arg-type]
