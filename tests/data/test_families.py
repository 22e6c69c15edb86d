"""Every family's template: what is graded, which ids end a turn, and what its tokenizer lacks.

The templates are those of family_templates, which tests/oracles/test_templates.py compares with
transformers. A family's tokenizer here is its control tokens over plain bytes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_core.data import (
    BUILTIN_TEMPLATES,
    Grader,
    SFTDataset,
    Tokenizer,
    builtin_template,
    check_vocabulary,
    missing_template_tokens,
)

FOLDER = Path(__file__).parent / "family_templates"
SPECS: dict[str, dict[str, Any]] = json.loads((FOLDER / "families.json").read_text())
# what stands between header and answer, and between answer and end token, and is graded
AROUND = {
    "llama2": (" ", " "),
    "mistral_v03": (" ", ""),
    "qwen3": ("<think>\n\n</think>\n\n", ""),
}
NO_SYSTEM = {"gemma", "mistral_v01"}
LAST_SYSTEM = {"mistral_nemo", "mistral_v03"}  # it moves to the last question
WITH_TOOLS = {"llama31", "mistral_nemo", "mistral_v03", "qwen25", "qwen3"}


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ONE = [said("user", "1+1?"), said("assistant", "two")]
CHAT = [*ONE, said("user", "and 2+2?"), said("assistant", "four é🙂")]
SYSTEM = said("system", "be short")
SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"x": {}}}}
CALL = {"id": "abcdefghi", "function": {"name": "add", "arguments": {"x": 1}}}
CALLED = [
    said("user", "1+1?"),
    said("assistant", "", tool_calls=[CALL]),
    said("tool", "2", tool_call_id="abcdefghi"),
    said("assistant", "two"),
]


def byte_tokenizer(spec: dict[str, Any], template: str | None, lacking: Sequence[str] = ()) -> Any:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokens = [token for token in spec["tokens"] if token not in lacking]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
    named = {f"{key}_token": spec[key] for key in ("bos", "eos") if spec[key] in tokens}
    return Tokenizer(backend, named, template)


@pytest.fixture(scope="module")
def toks() -> dict[str, Tokenizer]:
    return {
        name: byte_tokenizer(spec, (FOLDER / f"{name}.jinja").read_text())
        for name, spec in SPECS.items()
    }


def graded(tok: Tokenizer, messages: Any, train_on: str = "assistant", **more: Any) -> list[str]:
    """The graded runs of tokens as text."""
    row = Grader(tok, train_on=train_on)(messages, **more)
    assert row.straddles == 0
    runs: list[list[int]] = [[]]
    for index, keep in zip(row.ids, row.graded, strict=True):
        if keep:
            runs[-1].append(index)
        elif runs[-1]:
            runs.append([])
    return [tok.decode(run) for run in runs if run]


def expected(name: str, *answers: str) -> list[str]:
    before, after = AROUND.get(name, ("", ""))
    return [f"{before}{answer}{after}{SPECS[name]['end']}" for answer in answers]


@pytest.mark.parametrize("name", SPECS)
def test_answers_and_their_end_are_graded(toks: dict[str, Tokenizer], name: str) -> None:
    tok, both = toks[name], ["two", "four é🙂"]
    assert graded(tok, ONE) == expected(name, "two")
    assert graded(tok, CHAT, "last") == expected(name, both[1])
    if name == "qwen3":  # it writes an empty thought, but before the last answer only
        with pytest.raises(ValueError, match="up to message 1 differently when more messages"):
            Grader(tok)(CHAT)
    else:
        assert graded(tok, CHAT) == expected(name, *both)


@pytest.mark.parametrize("name", SPECS)
def test_with_a_system_message(toks: dict[str, Tokenizer], name: str) -> None:
    if name in NO_SYSTEM | LAST_SYSTEM:
        # Mistral's writes the system text only into a question that nothing follows
        message = "refuses" if name in NO_SYSTEM else r"message 4 differently.*\(template=\)$"
        with pytest.raises(ValueError, match=message):
            Grader(toks[name], train_on="last")([SYSTEM, *CHAT])
    else:
        assert graded(toks[name], [SYSTEM, *CHAT], "last") == expected(name, "four é🙂")


CALL_TEXT = {
    "llama31": '{"name": "add", "parameters": {"x": 1}}<|eot_id|>',
    "mistral_nemo": '[TOOL_CALLS][{"name": "add", "arguments": {"x": 1}, "id": "abcdefghi"}]</s>',
    "mistral_v03": '[TOOL_CALLS] [{"name": "add", "arguments": {"x": 1}, "id": "abcdefghi"}]</s>',
    "qwen25": '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
    "qwen3": '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
}


@pytest.mark.parametrize("name", SPECS)
def test_tool_calls_are_graded_or_refused(toks: dict[str, Tokenizer], name: str) -> None:
    tok = toks[name]
    if name not in WITH_TOOLS:
        message = "refuses|leaves out the tool call 'add' of message 1; choose a template with"
        with pytest.raises(ValueError, match=message):
            Grader(tok)(CALLED, tools=[SCHEMA])
        return
    call = AROUND[name][0] + CALL_TEXT[name] if name == "qwen3" else CALL_TEXT[name]
    assert graded(tok, CALLED[:2], tools=[SCHEMA]) == [call]
    assert graded(tok, CALLED, "last", tools=[SCHEMA]) == expected(name, "two")
    if name != "qwen3":
        assert graded(tok, CALLED, tools=[SCHEMA]) == [call, *expected(name, "two")]
    context = [CALLED[0], {**CALLED[1], "train": False}, *CALLED[2:]]
    assert graded(tok, context, tools=[SCHEMA]) == expected(name, "two")


def test_qwen3_thinking(toks: dict[str, Tokenizer]) -> None:
    """The thought of the last answer is the assistant's own; earlier ones are not in the text."""
    tok = toks["qwen3"]
    thoughts = [{**m, "reasoning_content": f"t{i}"} for i, m in enumerate(CHAT) if i % 2]
    chat = [CHAT[0], thoughts[0], CHAT[2], thoughts[1]]
    assert graded(tok, chat, "last") == ["<think>\nt3\n</think>\n\nfour é🙂<|im_end|>"]
    assert "t1" not in tok.render(chat)
    with pytest.raises(ValueError, match=r"differently when more messages.*or train_on='last'"):
        Grader(tok)(chat)


def test_smollm3_marks_without_header(toks: dict[str, Tokenizer]) -> None:
    """Its blocks hold header, empty thought and line break: none of them is graded."""
    tok = toks["smollm3"]
    assert Grader(tok)(CHAT).method == "marks"
    quiet = [said("system", "be short /no_think"), *CHAT]
    assert "<think>\n\n</think>\nfour" in tok.render(quiet)
    assert graded(tok, quiet) == expected("smollm3", "two", "four é🙂")
    prompt = tok.render(quiet[:-1], add_generation_prompt=True)
    assert tok.render(quiet).startswith(prompt)


def test_marks_whose_header_cannot_be_cut(toks: dict[str, Tokenizer]) -> None:
    block = "{% generation %}<|im_start|>bot\n{{ m.content }}<|im_end|>\n{% endgeneration %}"
    template = (
        f"{{% for m in messages %}}{block}{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(ValueError, match=r"block starts with the header '<\|im_start\|>' that"):
        Grader(toks["chatml"], template)(ONE)


def test_olmo2_headers_are_plain_text(toks: dict[str, Tokenizer]) -> None:
    tok = toks["olmo2"]
    assert not tok.is_token("<|user|>")
    assert missing_template_tokens(tok) == []
    with pytest.raises(ValueError, match=r"holds the control token '<\|user\|>' as text"):
        Grader(tok)([said("user", "<|user|>\nx"), ONE[1]])


@pytest.mark.parametrize("name", SPECS)
def test_eos_ids(toks: dict[str, Tokenizer], name: str) -> None:
    tok, spec = toks[name], SPECS[name]
    assert {tok.token(index) for index in tok.eos_ids} == {spec["eos"], spec["end"]}
    assert tok.token(tok.end_of_turn_id() or 0) == spec["end"]


# --- what does not fit together ---


@pytest.mark.parametrize("name", SPECS)
def test_tokens_that_a_tokenizer_lacks(name: str) -> None:
    template = (FOLDER / f"{name}.jinja").read_text()
    spec = SPECS[name]
    assert missing_template_tokens(byte_tokenizer(spec, template)) == []
    ends = [token for token in spec["tokens"] if token in template or token == spec["end"]]
    for token in ends:
        if "[" in token or token == spec["eos"]:
            continue  # [INST] is plain text in some tokenizers; eos is refused by its name
        tok = byte_tokenizer(spec, template, lacking=[token])
        assert missing_template_tokens(tok) == [token]
        if token == spec["end"]:
            with pytest.raises(ValueError, match="not one token each in this tokenizer; add them"):
                Grader(tok)(ONE)


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_a_template_of_another_family(toks: dict[str, Tokenizer], name: str) -> None:
    """A whole template of markers that the tokenizer lacks is no template of plain headers."""
    template = builtin_template(name)
    missing = missing_template_tokens(toks["olmo2"], template)
    assert missing_template_tokens(Tokenizer(toks["olmo2"].backend, {}, template)) == missing
    plain = {"alpaca", "llama2", "mistral"}
    assert bool(missing) == (name not in plain)


def test_tool_use_templates_grade_with_tools(toks: dict[str, Tokenizer]) -> None:
    plain = toks["chatml"].chat_template or ""
    named = {"default": plain, "tool_use": toks["qwen25"].chat_template or ""}
    tok = Tokenizer(toks["chatml"].backend, {"eos_token": "<|endoftext|>"}, named)
    assert graded(tok, CALLED, tools=[SCHEMA])[0] == CALL_TEXT["qwen25"]
    rows = SFTDataset([{"messages": CALLED, "tools": [SCHEMA]}], tok)
    assert tok.render(CALLED, tools=[SCHEMA]) == tok.decode(rows[0]["input_ids"])
    assert graded(tok, ONE) == expected("chatml", "two")
    with pytest.raises(ValueError, match="leaves out the tool call 'add'"):
        Grader(tok, plain)(CALLED, tools=[SCHEMA])


def test_vocabulary_and_embedding(toks: dict[str, Tokenizer]) -> None:
    tok = toks["gemma3"]
    size = tok.vocab_size  # 256 bytes, five tokens, <start_of_image>
    assert check_vocabulary(tok, size) is None
    assert check_vocabulary(tok, size + 60) is None  # rows are padded to round numbers
    assert check_vocabulary(tok, 32000) == (
        f"the tokenizer has {size} ids, the model 32000 embedding rows: is it the model's own?"
    )
    with pytest.raises(
        ValueError,
        match=rf"has {size} ids, the model 200 embedding rows: .* \(id 200\) has none; take .*"
        rf"grow_vocabulary\(model, {size}\)",
    ):
        check_vocabulary(tok, 200)
    with pytest.raises(ValueError, match=r"'<start_of_image>' \(id 261\) has none"):
        check_vocabulary(tok, size - 1)  # the template writes it
    with pytest.raises(ValueError, match=r"'<end_of_turn>' \(id 260\) has none"):
        check_vocabulary(Tokenizer(tok.backend, {"eos_token": "<end_of_turn>"}), size - 2)
    tok = Tokenizer(tok.backend, {}, toks["gemma"].chat_template)  # Gemma 3's text models
    line = check_vocabulary(tok, size - 1) or ""
    assert line.endswith("'<start_of_image>' (id 261) cannot be used")
