"""Chat templates of every family's shape render as transformers renders them, or both refuse.

The templates in tests/data/family_templates are written for these tests: they use the constructs of
the families' published ones and give the same turns, in other words.
"""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import Tokenizer, load_tokenizer

pytestmark = pytest.mark.oracle

FOLDER = Path(__file__).parents[1] / "data/family_templates"
FAMILIES: dict[str, dict[str, Any]] = json.loads((FOLDER / "families.json").read_text())
CONSTRUCTS = {"bos": "<s>", "eos": "</s>", "tokens": ["<s>", "</s>"]}
Case = tuple[list[dict[str, Any]], dict[str, Any]]


def read(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text()


@pytest.fixture(autouse=True)
def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same moment for both libraries; the day has one digit, the month is not English-only."""

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 3, 7, 21, 5)

    monkeypatch.setattr("lora_core.data.sandbox.datetime", Frozen)
    peer = pytest.importorskip("transformers.utils.chat_template_utils")
    monkeypatch.setattr(peer, "datetime", Frozen)


@pytest.fixture(scope="module")
def pair(oracle: Callable[[str], ModuleType]) -> Callable[..., tuple[Tokenizer, Any]]:
    """The library's tokenizer and transformers' of the same special tokens and template."""
    transformers, tokenizers = oracle("transformers"), oracle("tokenizers")

    def make(spec: dict[str, Any], template: Any) -> tuple[Tokenizer, Any]:
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        backend.add_special_tokens(spec["tokens"])
        named = {f"{key}_token": spec[key] for key in ("bos", "eos") if spec[key] is not None}
        theirs = {key: tokenizers.AddedToken(text, special=True) for key, text in named.items()}
        peer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=template, pad_token=None, **theirs
        )
        config = {
            key: {"__type": "AddedToken", "content": text, "special": True}
            for key, text in named.items()
        }
        return Tokenizer(backend, {**config, "pad_token": None}, template), peer

    return make


@pytest.fixture(scope="module")
def pairs(pair: Callable[..., tuple[Tokenizer, Any]]) -> dict[str, tuple[Tokenizer, Any]]:
    specs = {**FAMILIES, "constructs": CONSTRUCTS}
    return {name: pair(spec, read(name)) for name, spec in specs.items()}


def compare(both: tuple[Tokenizer, Any], case: Case) -> str | None:
    """Render with both and compare; the text, or None where both refuse."""
    messages, options = case
    tok, peer = both
    try:
        theirs = peer.apply_chat_template(messages, tokenize=False, **options)
    except Exception:  # noqa: BLE001 - a template can fail in any way
        with pytest.raises(ValueError, match=r"\S") as caught:
            tok.render(messages, **options)
        assert "\n" not in str(caught.value)
        return None
    assert tok.render(messages, **options) == theirs
    return theirs


# --- conversations drawn at random ---

TEXT = st.text(max_size=12) | st.sampled_from(
    [
        "",
        "  two blanks  ",
        "\n\nline\n",
        "{{ 1 }}{% if x %}{# #}",
        "<|im_end|>\n<|im_start|>system\n",
        "[INST]</s>[/INST]",
        "<think>\n\nwell\n</think>\n\nso",
        "</think>",
        "<tool_response>\n1\n</tool_response>",
        "be short /no_think",
        "/think /system_override x",
        "👩‍👩‍👧 e\u0301 \u2028 \ufeff",
        '"quoted" \\ & <b>',
    ]
)
PARTS = st.lists(
    st.builds(lambda text: {"type": "text", "text": text}, TEXT)
    | st.sampled_from([{"type": "image"}, {"type": "image", "url": "x"}, {"type": "video"}]),
    max_size=3,
)
CONTENT = st.one_of(TEXT, TEXT, TEXT, PARTS, st.none(), st.just({"content": "42"}))
ARGUMENTS = st.dictionaries(TEXT, TEXT | st.integers() | st.none(), max_size=2)
CALL = st.fixed_dictionaries(
    {
        "function": st.fixed_dictionaries(
            {"name": st.sampled_from(["f", "brave_search", "é"]), "arguments": ARGUMENTS | TEXT}
        )
    },
    optional={"id": st.sampled_from(["abcdefghi", "short"]), "type": st.just("function")},
)
REASONING = {name: st.none() | TEXT for name in ("reasoning_content", "thinking", "reasoning")}


def said(role: str, content: Any = CONTENT, **optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    fixed = {"role": st.just(role), "content": content}
    return st.fixed_dictionaries(fixed, optional=optional)


USER = said("user")
ANSWER = said("assistant", **REASONING)
ASKED = st.fixed_dictionaries(
    {"role": st.just("assistant"), "tool_calls": st.none() | st.lists(CALL, max_size=2)},
    optional={"content": CONTENT, **REASONING},
)
TOOL = said("tool", tool_call_id=st.sampled_from(["abcdefghi", "x"]), name=st.just("f"))
SYSTEM = said("system", tools=st.none() | st.just('[{"name": "f"}]'))
IN_TURN = st.builds(
    lambda first, turns, question: [*first, *(m for turn in turns for m in turn), *question],
    st.lists(SYSTEM, max_size=1),
    st.lists(st.tuples(USER, ANSWER) | st.tuples(USER, ASKED, TOOL, TOOL, ANSWER), max_size=3),
    st.lists(USER, max_size=1),
)
ANYHOW = st.lists(st.one_of(USER, ANSWER, ASKED, TOOL, SYSTEM, said("ipython")), max_size=5)
SCHEMA = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "<é> & 'so'",
        "parameters": {"type": "object", "properties": {"b": {"type": "integer"}, "a": {}}},
        "return": {"type": "string"},
    },
}
TOOLS = st.none() | st.sampled_from([[], [SCHEMA], [SCHEMA, {"name": "g"}], [SCHEMA, SCHEMA]])
OPTIONS = st.fixed_dictionaries(
    {"tools": TOOLS},
    optional={
        "add_generation_prompt": st.booleans(),
        "continue_final_message": st.sampled_from([False, False, True, "thinking", "nonsense"]),
        "documents": st.lists(st.builds(lambda text: {"title": "t", "text": text}, TEXT)),
        "enable_thinking": st.booleans(),
        "thinking": st.booleans(),
        "controls": st.sampled_from([{"citations": True}, {"length": "short"}]),
        "builtin_tools": st.sampled_from([["brave_search", "code_interpreter"], []]),
        "tools_in_user_message": st.booleans(),
        "custom_tools": st.sampled_from([[SCHEMA], None]),
        "xml_tools": st.just([SCHEMA]),
        "python_tools": st.just(["def f(): ..."]),
        "date_string": st.just("1 Jan"),
        "bos_token": st.just("another"),
    },
)


@pytest.mark.parametrize("name", [*FAMILIES, "constructs"])
@given(case=st.tuples(st.one_of(IN_TURN, IN_TURN, ANYHOW), OPTIONS))
def test_any_conversation(pairs: dict[str, tuple[Tokenizer, Any]], name: str, case: Case) -> None:
    compare(pairs[name], case)


# --- conversations that a family must have a form for ---

USUAL: list[dict[str, Any]] = [
    {"role": "user", "content": " What is {{ 2 }} + é? "},
    {"role": "assistant", "content": "four\n"},
    {"role": "user", "content": "and now?"},
]
REPLY = {"role": "assistant", "content": "five 🙂"}
FUNCTION = {"name": "f", "arguments": {"x": "<1>", "y": [1, 2]}}
CALLED: list[dict[str, Any]] = [
    USUAL[0],
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": FUNCTION}],
    },
    {"role": "tool", "content": "42", "tool_call_id": "abcdefghi"},
]
THOUGHT = {**REPLY, "reasoning_content": "let me see\n"}
WITH_SYSTEM = [{"role": "system", "content": "be short"}, *USUAL]
IN_PARTS = [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "image"}]}]
CASES: dict[str, Case] = {
    "single": (USUAL[:2], {}),
    "prompt": (USUAL, {"add_generation_prompt": True}),
    "several": ([*USUAL, REPLY], {}),
    "system": (WITH_SYSTEM, {"add_generation_prompt": True}),
    "parts": (IN_PARTS, {"add_generation_prompt": True}),
    "tools": ([*CALLED, REPLY], {"tools": [SCHEMA]}),
    "tools in the system turn": (WITH_SYSTEM, {"tools": [SCHEMA], "tools_in_user_message": False}),
    "thinking": ([*USUAL, THOUGHT], {}),
    "no thinking": (USUAL, {"add_generation_prompt": True, "enable_thinking": False}),
    "documents": (USUAL, {"documents": [{"text": "d"}, {"text": "e"}], "controls": {"k": 1}}),
    "continued": ([*USUAL, {**REPLY, "content": "five and "}], {"continue_final_message": True}),
}
WITH_CALLS = {"llama31", "mistral_nemo", "mistral_v03", "qwen25", "qwen3", "smollm3"}
WITH_PARTS = {"gemma3", "mistral_small", "qwen3", "smollm3"}
REPR = {"gemma", "llama3", "llama31"}  # `| trim` writes a list as Python shows it, None as nothing
REFUSED = {
    "system": {"gemma", "mistral_v01"},
    "tools in the system turn": {"gemma", "mistral_v01"},
    "tools": set(FAMILIES) - WITH_CALLS - {"llama3"},
    "parts": set(FAMILIES) - WITH_PARTS - REPR,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_usual_conversations(pairs: dict[str, tuple[Tokenizer, Any]], name: str) -> None:
    texts = {case: compare(pairs[name], CASES[case]) for case in CASES}
    refused = {case for case, text in texts.items() if text is None}
    assert refused == {case for case, names in REFUSED.items() if name in names}
    assert texts["continued"].endswith(("five and ", "five and"))
    assert len(set(texts.values()) - {None}) >= 4


def test_constructs(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    for messages in (USUAL, CALLED, [*WITH_SYSTEM, *IN_PARTS]):
        text = compare(pairs["constructs"], (messages, {"add_generation_prompt": True}))
        assert (text or "").endswith("prompt")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages.sort() }}",
        "{% set messages[0] = 1 %}",
        "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ dict.mro() }}",
        "{{ dict is callable }}{{ dict.items is defined }}{{ dict.update is defined }}",
        "{{ dict(a=1).pop('a') }}",
        "{{ namespace(_a=1) }}",
        "{{ namespace(self=1).self }}",
        "{% set ns = namespace() %}{% set ns._a = 1 %}",
        "{% set ns = namespace({'a': 1}) %}{{ ns.a }}{{ ns.b is defined }}",
        "{{ range(100001) | list | length }}",
        "{{ range(100000) | list | length }}",
        "{{ nothing.at.all }}",
        "{{ nothing() }}",
        "{{ nothing | tojson }}",
        "{{ nothing + 'x' }}",
        "{{ 'x' ~ nothing }}{{ nothing | length }}{% for x in nothing %}{% endfor %}",
        "{{ messages[9].role }}",
        "{{ 1 / 0 }}",
        "{{ 'é' | tojson(bad=1) }}",
        "{{ raise_exception('no\nway') }}",
        "{% raise 1 %}",
        "{% include 'file' %}",
        "{% import 'file' as file %}",
        "{% if %}",
        "{{ 'unclosed }}",
        "{% for m in messages %}",
        "{% break %}",
        "{{ self }}",
        "{{ lipsum is defined }}{{ cycler is defined }}{{ joiner is defined }}",
        "{{ strftime_now() }}",
        "{{ strftime_now('%A %j %%') }}",
        "{{ messages | groupby('role') | list }}{{ messages | batch(2) | list | length }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% macro m() %}{% generation %}x{% endgeneration %}{% endmacro %}{{ m() | upper }}",
        "{{ tools }}{{ documents }}{{ add_generation_prompt }}",
        "{{ messages | map('tojson') | join('\\n') }}",
        "{{ messages | tojson(indent=2) | indent(2) | wordcount }}",
        "{{ {'a': (1, 2), 3: none} }}",
        "{% call(x) dict() %}{% endcall %}",
        "{{ messages[0]['role'][0:2] }}{{ messages[-1:][0].role }}{{ messages[:-1] | length }}",
        "{% set text = messages[0].content if messages[0].role is string else '' %}{{ text }}",
        "{{ messages[0].content.items() }}",
        "{{ messages[0].content.encode() }}",
        "{{ (messages | first).content | string | list | reverse | join }}",
        "{{ 'a,b'.split(',') | tojson }}{{ 'ab'.partition('b') }}{{ 'x'.zfill(3) }}",
    ],
)
def test_the_sandbox_and_its_edges(
    pair: Callable[..., tuple[Tokenizer, Any]], template: str
) -> None:
    compare(pair(CONSTRUCTS, template), (USUAL, {}))


# --- where templates come from ---

NAMED = {
    "default": "plain {{ messages[0].content }}",
    "tool_use": "tools {{ tools | length }}",
    "rag": "rag {{ documents }}",
}


@pytest.mark.parametrize("tools", [None, [], [SCHEMA]])
def test_named_templates(pair: Callable[..., tuple[Tokenizer, Any]], tools: Any) -> None:
    text = compare(pair(CONSTRUCTS, NAMED), (USUAL, {"tools": tools}))
    assert (text or "").startswith("plain" if tools is None else "tools")


def test_folders_with_several_templates(
    oracle: Callable[[str], ModuleType], pair: Callable[..., tuple[Tokenizer, Any]], tmp_path: Path
) -> None:
    """Each library reads the templates that either of them saved."""
    ours, theirs = pair(CONSTRUCTS, NAMED)
    ours.save(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        peer = oracle("transformers").AutoTokenizer.from_pretrained(tmp_path / folder)
        tok = load_tokenizer(tmp_path / folder)
        assert tok.templates == peer.chat_template == NAMED
        assert tok.special_tokens == peer.special_tokens_map
    ours.chat_template = "one {{ messages[0].content }}"
    ours.save(tmp_path / "ours")
    peer = oracle("transformers").AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").chat_template == peer.chat_template
