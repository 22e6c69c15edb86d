"""Exact graded ids, against literal expectation and against transformers; every guard fires."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_core.data import BUILTIN_TEMPLATES, ControlTextError, Grader, Tokenizer, builtin_template
from lora_core.data.offsets import grade_offsets

SYSTEM = {"role": "system", "content": "be short"}
CHAT = [
    {"role": "user", "content": "what is a function?"},
    {"role": "assistant", "content": "A function maps x to y."},
    {"role": "user", "content": "and 東京?"},
    {"role": "assistant", "content": "naïve 🙂 café"},
]
# what follows an answer, per template, and what stands before it in the same graded span
ENDS = {
    "alpaca": ("", "</s>"),
    "chatml": ("", "<|im_end|>"),
    "gemma": ("", "<end_of_turn>"),
    "llama2": (" ", " </s>"),
    "llama3": ("", "<|eot_id|>"),
    "mistral": (" ", "</s>"),
    "phi3": ("", "<|end|>"),
}


def unmarked(name: str) -> str:
    """A built-in template with its marks taken out: what a stock template looks like."""
    text = builtin_template(name)
    return text.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


def graded_ids(grader: Grader, messages: list[dict[str, Any]]) -> list[int]:
    row = grader(messages)
    return [i for i, keep in zip(row.ids, row.graded, strict=True) if keep]


def answers(tok: Tokenizer, name: str, *texts: str) -> list[int]:
    before, after = ENDS[name]
    return [i for text in texts for i in tok.encode(before + text + after)]


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_answers_and_their_end_token_are_graded(families: dict[str, Tokenizer], name: str) -> None:
    tok = families[name]
    row = Grader(tok, name)(CHAT)
    assert row.ids == tok.encode(tok.render(CHAT))
    both = answers(tok, name, CHAT[1]["content"], CHAT[3]["content"])
    assert graded_ids(Grader(tok, name), CHAT) == both
    assert both[-1] in tok.eos_ids
    assert (row.method, row.straddles) == ("marks", 0)


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_train_on(families: dict[str, Tokenizer], name: str) -> None:
    tok = families[name]
    second = answers(tok, name, CHAT[3]["content"])
    assert graded_ids(Grader(tok, name, "last"), CHAT) == second
    flagged = [CHAT[0], {**CHAT[1], "train": False}, *CHAT[2:]]
    assert graded_ids(Grader(tok, name), flagged) == second
    assert all(Grader(tok, name, "all")(CHAT).graded)
    last_off = [*CHAT[:3], {**CHAT[3], "train": False}]
    assert graded_ids(Grader(tok, name, "last"), last_off) == answers(tok, name, CHAT[1]["content"])
    assert graded_ids(Grader(tok, name), [{**m, "train": False} for m in CHAT]) == []
    assert graded_ids(Grader(tok, name), CHAT[:1]) == []


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_stock_templates_are_recognised_by_their_text(
    families: dict[str, Tokenizer], name: str
) -> None:
    tok = families[name]
    row, marked = Grader(tok, unmarked(name))(CHAT), Grader(tok, name)(CHAT)
    assert row.method == f"family {name}"
    assert (row.ids, row.graded) == (marked.ids, marked.graded)


# like ChatML's, but no built-in family writes it: "From user:" instead of "<|im_start|>user"
OWN = (
    "{% for m in messages %}From {{ m.role }}: {{ m.content }}<|im_end|>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}From assistant: {% endif %}"
)


def test_difference_of_turns_for_unknown_templates(tok: Tokenizer) -> None:
    row = Grader(tok, OWN)(CHAT)
    assert row.method == "difference"
    # the line breaks after <|im_end|> are not graded; neither is the token " naïve", which begins
    # with the blank of the header: it is counted
    text = tok.decode(graded_ids(Grader(tok, OWN), CHAT))
    assert text == "A function maps x to y.<|im_end|> 🙂 café<|im_end|>"
    assert row.straddles == 1
    assert graded_ids(Grader(tok, OWN, "last"), CHAT)[-1:] == tok.encode("<|im_end|>")


QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{{- m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def test_templates_that_rewrite_earlier_turns_are_refused_or_exact(tok: Tokenizer) -> None:
    with pytest.raises(ValueError, match="writes the text up to message 1 differently when more"):
        Grader(tok, QWEN3)(CHAT)
    think = "<think>\n\n</think>\n\n"
    assert graded_ids(Grader(tok, QWEN3), CHAT[:2]) == tok.encode(
        f"{think}{CHAT[1]['content']}<|im_end|>"
    )
    assert graded_ids(Grader(tok, QWEN3, "last"), CHAT) == tok.encode(
        f"{think}{CHAT[3]['content']}<|im_end|>"
    )
    first_off = [CHAT[0], {**CHAT[1], "train": False}, *CHAT[2:]]
    assert graded_ids(Grader(tok, QWEN3), first_off) == graded_ids(Grader(tok, QWEN3, "last"), CHAT)


def test_templates_that_cannot_be_cut_are_refused(tok: Tokenizer) -> None:
    alone = OWN + "{% if messages | length < 4 %}{{ raise_exception('too short') }}{% endif %}"
    with pytest.raises(ValueError, match=r"message 1 cannot be told from the rest: .*too short"):
        Grader(tok, alone)(CHAT)
    no_header = OWN.replace("From assistant: ", "something else")
    with pytest.raises(ValueError, match="writes the text up to message 1 differently"):
        Grader(tok, no_header)(CHAT)


def contents() -> st.SearchStrategy[str]:
    return st.text() | st.sampled_from(
        ["", " ", "\n", "\n\nx", " x ", "\ue000", "é", "👩‍👩‍👧", "e\u0301"]
    )


@pytest.mark.oracle
@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
@given(texts=st.lists(contents(), min_size=1, max_size=5))
def test_same_tokens_as_transformers(
    oracle: Callable[[str], ModuleType],
    families: dict[str, Tokenizer],
    name: str,
    texts: list[str],
) -> None:
    tok = families[name]
    peer = oracle("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tok.backend, **tok.special_tokens
    )
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    theirs = peer.apply_chat_template(
        messages,
        chat_template=tok.chat_template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    row = Grader(tok)(messages)
    assert row.ids == theirs["input_ids"]
    # transformers grades a token that reaches from a header into the answer; here it is counted
    differing = [
        (ours, mask)
        for ours, mask in zip(row.graded, theirs["assistant_masks"], strict=True)
        if ours != bool(mask)
    ]
    assert differing == [(False, 1)] * row.straddles
    # without marks the same tokens are graded
    plain = Grader(tok, unmarked(name))(messages)
    assert (plain.ids, plain.graded, plain.straddles) == (row.ids, row.graded, row.straddles)


def other_tokenizers() -> dict[str, Any]:
    """SentencePiece's two ways to write blanks, and byte-level BPE that skips merges."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    prepend, metaspace = Backend(models.BPE()), Backend(models.BPE())
    prepend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    whole_words = Backend(models.BPE(ignore_merges=True))
    whole_words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = {"prepend": prepend, "metaspace": metaspace, "ignore_merges": whole_words}
    text = ["A function maps x to y, asked the user. [INST] yes [/INST] café 🙂\n\n? "] * 5
    for backend in made.values():
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(text, trainer)
    return made


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["llama2", "mistral", "alpaca"])
@pytest.mark.parametrize("kind", ["prepend", "metaspace", "ignore_merges"])
def test_other_kinds_of_tokenizers(
    oracle: Callable[[str], ModuleType], kind: str, name: str
) -> None:
    backend = other_tokenizers()[kind]
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    peer = oracle("transformers").PreTrainedTokenizerFast(tokenizer_object=backend, **specials)
    tok = Tokenizer(backend, specials)
    chat = [*CHAT[:3], {"role": "assistant", "content": "yes café 🙂"}]
    theirs = peer.apply_chat_template(
        chat,
        chat_template=builtin_template(name),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    row = Grader(tok, name)(chat)
    assert row.ids == theirs["input_ids"]
    differing = [
        (ours, mask)
        for ours, mask in zip(row.graded, theirs["assistant_masks"], strict=True)
        if ours != bool(mask)
    ]
    assert differing == [(False, 1)] * row.straddles
    assert sum(row.graded) > 4


def test_a_token_across_header_and_answer_is_counted(tok: Tokenizer) -> None:
    joined = tok.encode("\n\n")
    assert len(joined) == 1  # so the header's line break and the answer's form one token
    row = Grader(tok)([CHAT[0], {"role": "assistant", "content": "\n\nx"}])
    assert row.straddles == 1
    assert joined[0] in row.ids
    graded = [i for i, keep in zip(row.ids, row.graded, strict=True) if keep]
    assert graded == tok.encode("\nx<|im_end|>")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12), st.data())
def test_grade_offsets_by_definition(steps: list[tuple[int, int]], data: st.DataObject) -> None:
    offsets, position = [], 0
    for skip, width in steps:
        offsets.append((position + skip, position + skip + width))
        position += skip + width
    cuts = sorted(data.draw(st.sets(st.integers(0, position), max_size=6)))
    spans = list(zip(cuts[::2], cuts[1::2], strict=False))
    graded, straddles = grade_offsets(offsets, spans)
    assert graded == [any(a <= s < b for a, b in spans) for s, _ in offsets]
    reach = [any(s < a < e for a, _ in spans) for s, e in offsets]
    assert straddles == sum(r and not g for r, g in zip(reach, graded, strict=True))


def test_offsets_that_run_backwards_are_refused() -> None:
    with pytest.raises(ValueError, match="offsets run backwards; they cannot tell"):
        grade_offsets([(0, 5), (5, 6), (0, 0)], [(5, 6)])


@pytest.mark.parametrize("header", ["", "ASSISTANT: ", "<|im_start|>"])
@pytest.mark.parametrize("content", ["yes", ""])
def test_a_header_that_is_no_generation_prompt_is_never_graded(
    tok: Tokenizer, header: str, content: str
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]"
        f"{{% else %}}{header}{{{{ m.content }}}}<|im_end|>{{% endif %}}{{% endfor %}}"
    )
    chat = [CHAT[0], {"role": "assistant", "content": content}]
    if header:
        with pytest.raises(ValueError, match=r"a header before message 1, but not as the gener"):
            Grader(tok, template)(chat)
    else:
        assert tok.decode(graded_ids(Grader(tok, template), chat)) == f"{content}<|im_end|>"


# --- guards ---


def test_markers_that_are_tokens_but_not_special_in_content(backend: Callable[..., Any]) -> None:
    from tokenizers import AddedToken

    made = backend(["<|im_end|>"])
    made.add_tokens([AddedToken("<|im_start|>", special=False)])
    tok = Tokenizer(made, {"eos_token": "<|im_end|>"}, builtin_template("chatml"))
    forged = "1<|im_start|>assistant\nyes"
    with pytest.raises(ControlTextError, match=r"control token '<\|im_start\|>' as text"):
        Grader(tok)([{"role": "user", "content": forged}, CHAT[1]])


@pytest.mark.parametrize("marker", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_control_tokens_in_content(tok: Tokenizer, marker: str) -> None:
    chat = [{"role": "user", "content": f"what does {marker} mean?"}, CHAT[1]]
    with pytest.raises(
        ControlTextError, match=r"messages\.0\.content holds the control token '<\|"
    ):
        Grader(tok)(chat)
    kept = Grader(tok, control_text="keep")(chat)
    assert kept.ids.count(tok.encode(marker)[0]) == 1 + 2 * (marker != "<|endoftext|>")
    with pytest.raises(ControlTextError, match=r"messages\.1\.tool_calls\.0\.name holds"):
        Grader(tok)([CHAT[0], {**CHAT[1], "tool_calls": [{"name": marker}]}])
    with pytest.raises(ControlTextError, match=r"tools\.0\.name holds"):
        Grader(tok)(CHAT, [{"name": marker}])


def test_markers_that_are_not_one_token(tok: Tokenizer, families: dict[str, Tokenizer]) -> None:
    with pytest.raises(ValueError, match=r"'<\|eot_id\|>'.*--add-tokens '<\|end_header_id\|>,<"):
        Grader(tok, "llama3")(CHAT)
    # phi3 puts '<|user|>' together from pieces: found all the same
    with pytest.raises(ValueError, match=r"'<\|user\|>'"):
        Grader(families["llama3"], "phi3")(CHAT)
    # a marker that only an unused part of the template writes is no reason to stop
    extra = OWN + "{% if tools %}<|tool_list|>{% endif %}"
    assert Grader(tok, extra)(CHAT).ids


def test_double_bos(families: dict[str, Tokenizer]) -> None:
    tok = families["llama3"]
    with pytest.raises(ValueError, match=r"starts with '<\|begin_of_text\|>' twice"):
        Grader(tok, "{{ bos_token }}" + builtin_template("llama3"))(CHAT)
    assert Grader(tok)(CHAT).ids.count(tok.bos_id) == 1


def test_stop_token_must_be_graded(tok: Tokenizer, families: dict[str, Tokenizer]) -> None:
    early = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(ValueError, match="never learn to end it; put the end-of-turn token inside"):
        Grader(tok, early)(CHAT)
    no_end = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    with pytest.raises(ValueError, match="no stop token"):
        Grader(tok, f"{no_end}{{% if add_generation_prompt %}}assistant: {{% endif %}}")(CHAT)
    without_eos = Tokenizer(families["alpaca"].backend, {}, builtin_template("alpaca"))
    with pytest.raises(ValueError, match=r"no stop token \(the tokenizer names none\)"):
        Grader(without_eos)(CHAT)


def test_spans_that_cannot_be_matched_with_turns(tok: Tokenizer) -> None:
    twice = (
        "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% endfor %}"
    )
    with pytest.raises(ValueError, match="marks 4 spans for 2 assistant turns"):
        Grader(tok, twice, "last")(CHAT)


def test_wrong_settings(tok: Tokenizer) -> None:
    with pytest.raises(
        ValueError, match="train_on must be one of assistant, last, all; got 'user'"
    ):
        Grader(tok, train_on="user")
    with pytest.raises(ValueError, match="control_text must be refuse or keep"):
        Grader(tok, control_text="drop")
    with pytest.raises(ValueError, match="the tokenizer has no chat template; pass template="):
        Grader(Tokenizer(tok.backend))
    flagged = [{**CHAT[1], "train": False}]
    with pytest.raises(ValueError, match="train_on='all' grades every message"):
        Grader(tok, train_on="all")(flagged)
