"""Templates render as transformers renders them, in a sandbox, with spans nothing can confuse."""

import enum
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import BUILTIN_TEMPLATES, Tokenizer, builtin_template, load_template
from lora_core.data.chat import has_marks, render_chat, render_spans, template_markers

SYSTEM = {"role": "system", "content": " be short "}
CHAT = [
    {"role": "user", "content": " q1 "},
    {"role": "assistant", "content": " a1\n"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "é🙂"},
]
# contents that try to look like the marks, like tags and like control tokens
TRICKY = st.text() | st.sampled_from(
    [
        "",
        " ",
        "\n\n",
        "\ue000",
        "\ue000<",
        "\ue000>x<",
        "{% generation %}",
        "{{ 1 }}",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "👩‍👩‍👧",
        "e\u0301",
        "\u2028",
        "\x00",
        "[/INST]",
    ]
)


def conversations(with_system: bool = True) -> st.SearchStrategy[list[dict[str, str]]]:
    """User and assistant in turn, perhaps after a system message, perhaps without an answer."""

    def build(contents: list[str], system: str | None) -> list[dict[str, str]]:
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
        return [{"role": "system", "content": system}, *turns] if system is not None else turns

    system = st.none() | TRICKY if with_system else st.none()
    return st.builds(build, st.lists(TRICKY, min_size=1, max_size=5), system)


EXPECTED = {
    "alpaca": (
        "<s>Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n q1 \n\n### Response:\n[ a1\n</s>]\n\n"
        "### Instruction:\nq2\n\n### Response:\n[é🙂</s>]"
    ),
    "chatml": (
        "<|im_start|>user\n q1 <|im_end|>\n<|im_start|>assistant\n[ a1\n<|im_end|>]\n"
        "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[é🙂<|im_end|>]\n"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\n[a1<end_of_turn>]\n"
        "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\n[é🙂<end_of_turn>]\n"
    ),
    "llama2": "<s>[INST] q1 [/INST][ a1 </s>]<s>[INST] q2 [/INST][ é🙂 </s>]",
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[a1<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\nq2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[é🙂<|eot_id|>]"
    ),
    "mistral": "<s>[INST]  q1 [/INST][  a1\n</s>][INST] q2[/INST][ é🙂</s>]",
    "phi3": (
        "<|user|>\n q1 <|end|>\n<|assistant|>\n[ a1\n<|end|>]\n"
        "<|user|>\nq2<|end|>\n<|assistant|>\n[é🙂<|end|>]\n<|endoftext|>"
    ),
}


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_builtin_text_and_spans(families: dict[str, Tokenizer], name: str) -> None:
    tok = families[name]
    text, spans = render_spans(builtin_template(name), CHAT, variables=tok.special_tokens)
    shown = text
    for start, end in reversed(spans):
        shown = f"{shown[:start]}[{shown[start:end]}]{shown[end:]}"
    assert shown == EXPECTED[name]
    assert text == tok.render(CHAT)
    # what is generated after the prompt is what is graded
    before = tok.render(CHAT[:3], add_generation_prompt=True)
    assert text.startswith(before)
    assert spans[1][0] == len(before)


def test_system_messages(families: dict[str, Tokenizer]) -> None:
    expected = {
        # the system text stands in place of the usual introduction
        "alpaca": "<s> be short \n\n### Instruction:",
        "chatml": "<|im_start|>system\n be short <|im_end|>\n<|im_start|>user",
        "llama2": "<s>[INST] <<SYS>>\n be short \n<</SYS>>\n\n q1 [/INST]",
        "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe short<|",
        "mistral": "<s>[INST]  be short \n\n q1 [/INST]",
        "phi3": "<|system|>\n be short <|end|>\n<|user|>",
    }
    for name, start in expected.items():
        assert families[name].render([SYSTEM, *CHAT]).startswith(start), name
    with pytest.raises(ValueError, match=r"gemma wants user and assistant in turn.*no system role"):
        families["gemma"].render([SYSTEM, *CHAT])


def test_alpaca_keeps_the_input_apart(families: dict[str, Tokenizer]) -> None:
    message = {"role": "user", "content": "do\n\nthis", "instruction": "do", "input": "this"}
    text = families["alpaca"].render([message], add_generation_prompt=True)
    assert text.startswith("<s>Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:\n")


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_builtins_never_leave_something_out(families: dict[str, Tokenizer], name: str) -> None:
    tool = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(ValueError, match="the chat template refuses"):
        families[name].render([CHAT[0], tool])
    if name != "chatml":
        with pytest.raises(ValueError, match="the chat template refuses"):
            families[name].render([CHAT[0], {"role": "tool", "content": "42"}])


STOCK = {
    "qwen3-like": (
        "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
        "{%- if m.role == 'assistant' and loop.index0 > ns.last %}"
        "{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}"
        "{{- m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    "filters": (
        "{{ tools | tojson }}{{ messages | tojson(indent=1) }}{% for m in messages %}\n"
        "  {% if loop.index > 3 %}{% break %}{% endif %}\n"
        "  {{ m.content | trim | upper | title }}{{ bos_token }}{{ undefined_name }}\n"
        "{% endfor %}{{ documents is none }}{{ '%s' % add_generation_prompt }}"
    ),
    "macro": (
        "{% macro turn(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}{{ turn(m) }}|{% endfor %}"
    ),
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", [*BUILTIN_TEMPLATES, *STOCK])
@given(data=st.data())
def test_renders_like_transformers(
    oracle: Callable[[str], ModuleType], name: str, data: st.DataObject
) -> None:
    peer = oracle("transformers.utils.chat_template_utils")
    template = STOCK.get(name) or builtin_template(name)
    messages = data.draw(conversations(with_system=name != "gemma"))
    extra: dict[str, Any] = data.draw(
        st.fixed_dictionaries(
            {"bos_token": st.just("<s>"), "eos_token": st.just("</s>")},
            optional={"tools": st.just([{"name": "<f>", "x": "é"}])},
        )
    )
    prompt = data.draw(st.booleans())
    ((theirs,), ((*their_spans,),)) = peer.render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **extra
    )
    tools = extra.pop("tools", None)
    ours, spans = render_spans(template, messages, tools=tools, variables=extra)
    assert (ours, spans) == (theirs, their_spans)
    (theirs,), _ = peer.render_jinja_template(
        [messages], chat_template=template, tools=tools, add_generation_prompt=prompt, **extra
    )
    ours = render_chat(
        template, messages, tools=tools, add_generation_prompt=prompt, variables=extra
    )
    assert ours == theirs


def test_reasoning_under_every_name() -> None:
    template = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert render_chat(template, [{"role": "assistant", name: "r"}]) == "rr"


def test_a_new_number_in_every_render(monkeypatch: pytest.MonkeyPatch) -> None:
    """Content that imitates one render's marks is plain text in the next."""
    template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}"
    )
    imitation = "\ue000deadbeefdeadbeef<x\ue000deadbeefdeadbeef>"
    text, spans = render_spans(template, [{"content": imitation}, {"content": "b"}])
    assert text == f"{imitation};b;"
    assert spans == [(0, len(imitation)), (len(imitation) + 1, len(imitation) + 2)]
    # the planted fault: with a number that content can know, the imitation is caught, not believed
    monkeypatch.setattr("secrets.token_hex", lambda n: "deadbeef" * (n // 4))
    with pytest.raises(ValueError, match="nests"):
        render_spans(template, [{"content": imitation}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", r"the chat template refuses: .*\(line 1 of the template\)"),
        ("{{ 1 }}\n{% if 1 %}\n{% endfor %}", r"unknown tag 'endfor'.*\(line 3 of the template\)"),
        ("{{ raise_exception('no\nway') }}", "refuses: no way$"),
        ("{{ messages | tojson(bad=1) }}", r"fails on this conversation: .*argument 'bad'"),
        ("{{ raise_exception('no tools here') }}", "the chat template refuses: no tools here"),
        ("{{ '{}'.format() }}", "the chat template fails on this conversation: .*index"),
        ("{{ 'a' + 1 }}", "the chat template fails on this conversation: can only concatenate"),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses"),
        ("{{ messages.append(1) }}", "the chat template refuses"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "may not store the attribute '_x'"),
        ("{{ range(10 ** 9) | list }}", "the chat template fails|refuses"),
    ],
)
def test_templates_that_fail_or_reach_out(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        render_chat(template, CHAT)
    assert "\n" not in str(caught.value)


def test_marks_that_cannot_be_trusted() -> None:
    nested = "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}"
    with pytest.raises(ValueError, match=r"nests \{% generation %} blocks"):
        render_spans(nested, CHAT)
    filtered = "{% filter trim %}{% generation %} a {% endgeneration %}{% endfilter %}"
    with pytest.raises(ValueError, match=r"changes the text of a \{% generation %} block"):
        render_spans(filtered, CHAT)
    cut = "{% filter truncate(24, True, '') %}{% generation %}aaa{% endgeneration %}{% endfilter %}"
    with pytest.raises(ValueError, match=r"changes the text of a \{% generation %} block"):
        render_spans(cut, CHAT)


def test_only_plain_data_reaches_a_template() -> None:
    with pytest.raises(ValueError, match=r"takes strings, numbers, lists.*; got PosixPath"):
        render_chat("{{ messages }}", [{"role": "user", "content": Path("x")}])

    class Text(str):
        def reach_out(self) -> str:
            return "out"

    assert render_chat("{{ messages[0].content.reach_out }}", [{"content": Text("x")}]) == ""


def test_numbers_and_tuples_reach_a_template_as_they_are() -> None:
    class Level(enum.IntEnum):
        LOW = 1

    values = {"t": (1, 2.5), "level": Level.LOW, 3: None}
    assert render_chat("{{ messages[0].v }}", [{"v": values}]) == str(
        {"t": (1, 2.5), "level": 1, 3: None}
    )


def test_none_is_absent() -> None:
    template = "{{ 'content' in messages[0] }} {{ messages[0].tool_calls is defined }}"
    message = {"role": "assistant", "content": None, "tool_calls": None}
    assert render_chat(template, [message]) == "False False"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tools": ["f"]}, r"tools must be a list of dictionaries; got \['f'\]"),
        ({"variables": {"documents": [1]}}, r"documents must be a list of dictionaries; got \[1\]"),
        ({"messages": ["q"]}, "a message is a dictionary with role and content; got 'q'"),
    ],
)
def test_what_is_no_dictionary(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_chat("x", **{"messages": CHAT, **given})


def test_continuing_the_last_message(tok: Tokenizer) -> None:
    open_turn = [*CHAT[:3], {"role": "assistant", "content": "so far "}]
    assert tok.render(open_turn, continue_final_message=True).endswith("assistant\nso far ")
    template = "{% for m in messages %}{{ m.thinking }}[{{ m.content | trim }}]{% endfor %}"
    options: dict[str, Any] = {"continue_final_message": True}
    assert render_chat(template, open_turn, **options).endswith("[q2][so far")
    parts = [{"content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    assert render_chat("{{ messages[0].content[0].text }}]", parts, **options) == "a"
    thought = [{"content": "c", "reasoning": "well"}]
    assert render_chat(template, thought, continue_final_message="reasoning") == "well"
    for messages, field, message in [
        ([], True, "continue_final_message needs a message; the conversation is empty"),
        ([{"role": "assistant"}], True, "no text in 'content' to continue; got None"),
        ([{"content": [{"type": "image"}]}], True, "no text in 'content' to continue; got"),
        ([{"other": "x"}], "other", "reads no 'other', so it cannot be continued"),
        ([{"content": "x", "name": "n"}], "name", "reads no 'name', so it cannot be continued"),
    ]:
        with pytest.raises(ValueError, match=message):
            render_chat(template, messages, continue_final_message=field)
    with pytest.raises(ValueError, match="leaves out or changes the 'content' to be continued"):
        render_chat("{{ messages[0].content | upper }}", open_turn, **options)
    with pytest.raises(ValueError, match="add_generation_prompt exclude each other"):
        tok.render(open_turn, add_generation_prompt=True, **options)


def test_where_templates_come_from(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ 1 }}")
    assert load_template("chatml") == builtin_template("chatml")
    assert load_template(file) == load_template(str(file)) == load_template("{{ 1 }}") == "{{ 1 }}"
    with pytest.raises(ValueError, match=r"template 'chatlm' is neither a built-in name \(alpaca"):
        load_template("chatlm")
    with pytest.raises(ValueError, match=r"template 'x{80}' is neither"):
        load_template("x" * 5000)  # longer than a file's name may be
    with pytest.raises(ValueError, match="no built-in template 'x'"):
        builtin_template("x")
    with pytest.raises(FileNotFoundError):
        load_template(tmp_path / "nowhere")


def test_markers_and_marks() -> None:
    assert template_markers(builtin_template("gemma")) == ["<start_of_turn>", "<end_of_turn>"]
    assert all(has_marks(builtin_template(name)) for name in BUILTIN_TEMPLATES)
    assert has_marks("{%- generation -%}")
    assert not has_marks("{{ generation }}")
