"""Answers: the same however they are batched or broken off, bound to settings, in order."""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.adapters import PromptTuningConfig, add_adapter, disable_adapters
from lora_core.data import Tokenizer, load_tokenizer
from lora_core.evaluate import (
    Answer,
    AnswerFile,
    Question,
    answer_questions,
    prompt_of,
    read_answers,
)
from lora_core.models import CausalLM, ModelConfig, Sampling, generate

SYSTEM = {"role": "system", "content": "be brief"}
TEXTS = ["a", "what is a tensor?", "the linear layer " * 6, "x = 1", "os.path", "import json", "?"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def tok(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """2 layers of 32, random, 128 positions; its greedy answers differ from prompt to prompt."""
    torch.manual_seed(0)
    config = ModelConfig(400, 32, 48, 2, 4, max_position_embeddings=128, tie_word_embeddings=False)
    model = CausalLM(config)
    model.init_weights(0.3)
    return model.eval()


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return [
        Question(f"q{i}", (user(text),), (text,), f"q.jsonl:{i + 1}")
        for i, text in enumerate(TEXTS)
    ]


def test_answers_are_those_of_generate_in_order(
    model: CausalLM, tok: Tokenizer, questions: list[Question]
) -> None:
    want = [generate(model, tok, list(q.messages), max_new_tokens=6) for q in questions]
    assert len(set(want)) > 3  # the model says different things
    for size in (1, 3, 16):
        found = answer_questions(model, tok, questions, max_new_tokens=6, batch_size=size)
        assert [answer.text for answer in found] == want
        assert [answer.id for answer in found] == [q.id for q in questions]
    first = found[0]
    assert (first.messages, first.references) == (questions[0].messages, ("a",))
    assert first.prompt_tokens == len(tok.encode_prompt(questions[0].messages))
    assert (first.new_tokens, first.cut) == (6, True)


def test_an_answer_that_ends_is_without_its_end(
    model: CausalLM, tok: Tokenizer, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that wants nothing but to stop: an empty answer of one token, not cut."""
    end = tok.eos_id

    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, ids: torch.Tensor, attention_mask: Any = None) -> Any:
            logits = torch.zeros(*ids.shape, 400)
            logits[..., end] = 1.0
            return type("Output", (), {"logits": logits})

    found = answer_questions(Silent(), tok, questions[:2], max_new_tokens=6)
    assert [(a.text, a.new_tokens, a.cut) for a in found] == [("", 1, False)] * 2


def test_modes_are_kept(model: CausalLM, tok: Tokenizer, questions: list[Question]) -> None:
    part = model.model.layers[0]
    model.train()
    part.eval()
    try:
        answer_questions(model, tok, questions[:2], max_new_tokens=2)
        assert model.training
        assert not part.training
    finally:
        model.eval()


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


def breaking(after: int) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """A progress bar that breaks the run off after so many batches."""

    def wrap(batches: Sequence[Any]) -> Iterable[Any]:
        for number, batch in enumerate(batches):
            if number == after:
                raise Interrupted
            yield batch

    return wrap


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_run_broken_off_goes_on(
    after: int, model: CausalLM, tok: Tokenizer, questions: list[Question], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "batch_size": 3,
        "sampling": Sampling(temperature=1.0),
        "seed": 3,
    }
    whole = answer_questions(model, tok, questions, **options)
    out = tmp_path / "answers.jsonl"
    with pytest.raises(Interrupted):
        answer_questions(model, tok, questions, out=out, progress=breaking(after), **options)
    assert len(out.read_text().splitlines()) == 3 * after if after else not out.exists()
    asked: list[Any] = []

    def count(batches: Sequence[Any]) -> Iterable[Any]:
        asked.extend(batches)
        return batches

    assert answer_questions(model, tok, questions, out=out, progress=count, **options) == whole
    assert len(asked) == 3 - after
    assert (
        answer_questions(model, tok, questions, out=out, progress=breaking(0), **options) == whole
    )
    assert sorted(a.id for a in read_answers(out)) == [q.id for q in questions]


def test_a_torn_line_is_asked_again(
    model: CausalLM, tok: Tokenizer, questions: list[Question], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    whole = answer_questions(model, tok, questions, max_new_tokens=4, out=out)
    content = out.read_bytes()
    for cut in (len(content) - 5, content.index(b"\n") + 3, 4):
        out.write_bytes(content[:cut])
        assert answer_questions(model, tok, questions, max_new_tokens=4, out=out) == whole
        assert len(read_answers(out)) == len(questions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens was 4, is 5"),
        ({"system": "x"}, 'system was null, is "x"'),
        ({"bound": {"adapter": "b"}}, 'adapter was "a", is "b"'),
        ({"sampling": Sampling(temperature=0.5)}, "temperature was 0.0, is 0.5"),
        ({"shots": [(user("a"), {"role": "assistant", "content": "b"})]}, r'shots was "0 \('),
    ],
)
def test_other_settings_are_refused_by_name(
    change: dict[str, Any],
    message: str,
    model: CausalLM,
    tok: Tokenizer,
    questions: list[Question],
    tmp_path: Path,
) -> None:
    out = tmp_path / "answers.jsonl"
    usual: dict[str, Any] = {"max_new_tokens": 4, "bound": {"adapter": "a"}, "out": out}
    answer_questions(model, tok, questions, **usual)
    before = out.read_bytes()
    with pytest.raises(ValueError, match=f"answers of other settings: {message}"):
        answer_questions(model, tok, questions, **(usual | change))
    with pytest.raises(ValueError, match=r'questions was "7 \(\w+\)", is "6 '):
        answer_questions(model, tok, questions[:6], **usual)
    assert out.read_bytes() == before


def test_a_file_of_unknown_making_is_left_alone(
    model: CausalLM, tok: Tokenizer, questions: list[Question], tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text('{"answer": "mine"}\n')
    with pytest.raises(ValueError, match=r"no answers\.settings\.json says what made them"):
        answer_questions(model, tok, questions, max_new_tokens=4, out=out)
    (tmp_path / "answers.settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"answers\.settings\.json is not valid JSON"):
        answer_questions(model, tok, questions, max_new_tokens=4, out=out)
    assert out.read_text() == '{"answer": "mine"}\n'
    with pytest.raises(FileNotFoundError, match="no folder"):
        AnswerFile(tmp_path / "absent" / "answers.jsonl", {})


def test_every_question_draws_by_itself(
    model: CausalLM, tok: Tokenizer, questions: list[Question]
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "sampling": Sampling(temperature=1.0)}
    all_of_them = answer_questions(model, tok, questions, seed=1, **options)
    assert answer_questions(model, tok, questions[2:4], seed=1, **options) == all_of_them[2:4]
    twins = [Question(name, (user("a"),), (), "f:1") for name in ("one", "two")]
    one, two = answer_questions(model, tok, twins, seed=1, **options)
    assert one.text != two.text
    assert answer_questions(model, tok, questions, seed=2, **options) != all_of_them


def test_system_and_examples_come_before_the_question() -> None:
    own = Question("1", (SYSTEM, user("q")), (), "f:1")
    said = {"role": "assistant", "content": "b"}
    shot = ({"role": "system", "content": "elsewhere"}, user("a"), said)
    assert prompt_of(own) == (SYSTEM, user("q"))
    assert prompt_of(own, "new", [shot]) == (
        {"role": "system", "content": "new"},
        user("a"),
        said,
        user("q"),
    )
    assert prompt_of(own, shots=[shot]) == (SYSTEM, user("a"), said, user("q"))
    bare = Question("1", (user("q"),), (), "f:1")
    assert prompt_of(bare, "new") == ({"role": "system", "content": "new"}, user("q"))
    raw = Question("2", "2 + 2 =", (), "f:2")
    assert prompt_of(raw, shots=["1 + 1 = 2", "3 = 3"]) == "1 + 1 = 2\n\n3 = 3\n\n2 + 2 ="
    with pytest.raises(ValueError, match=r"f:2: raw text .* no place for a system text"):
        prompt_of(raw, "new")
    with pytest.raises(ValueError, match="f:2: raw text takes raw examples; got turns"):
        prompt_of(raw, shots=[shot])
    with pytest.raises(ValueError, match="f:1: turns take examples of turns; got raw text"):
        prompt_of(own, shots=["1 + 1 = 2"])


def test_what_the_model_is_shown_is_what_is_measured(
    model: CausalLM, tok: Tokenizer, questions: list[Question]
) -> None:
    shot = (user("a"), {"role": "assistant", "content": "b"})
    (found,) = answer_questions(
        model, tok, questions[:1], system="be brief", shots=[shot], max_new_tokens=3
    )
    shown = [SYSTEM, *shot, *questions[0].messages]
    assert found.prompt_tokens == len(tok.encode_prompt(shown))
    assert found.text == generate(model, tok, shown, max_new_tokens=3)
    assert found.messages == questions[0].messages


def test_raw_text_is_continued_without_a_template(model: CausalLM, tok: Tokenizer) -> None:
    (found,) = answer_questions(
        model, tok, [Question("1", "import json", (), "f:1")], max_new_tokens=3
    )
    assert found.text == generate(model, tok, "import json", max_new_tokens=3)


def test_tools_reach_the_template(model: CausalLM, tok: Tokenizer) -> None:
    tok = copy.deepcopy(tok)
    tools = "{% for t in tools or [] %}{{ t.name }}\n{% endfor %}"
    tok.chat_template = f"{tools}{tok.chat_template}"
    asked = Question("1", (user("a"),), (), "f:1", tools=({"name": "add"},))
    (found,) = answer_questions(model, tok, [asked], max_new_tokens=2)
    text = tok.render(asked.messages, add_generation_prompt=True, tools=[{"name": "add"}])
    assert "add" in text
    assert found.prompt_tokens == len(tok.encode(text))


def test_a_prompt_without_room_is_named_before_any_answer(
    model: CausalLM, tok: Tokenizer, questions: list[Question], tmp_path: Path
) -> None:
    long = Question("long", (user("the linear layer " * 40),), (), "q.jsonl:8")
    out = tmp_path / "answers.jsonl"
    with pytest.raises(
        ValueError,
        match=r"q\.jsonl:8: a prompt of \d+ tokens \+ 4 new ones is more than the model's 128 "
        r"positions \(1 of 8 rows are too long\): lower max_new_tokens",
    ):
        answer_questions(model, tok, [*questions, long], max_new_tokens=4, out=out)
    assert not out.exists()
    room = 128 - max(len(tok.encode_prompt(q.messages)) for q in questions)
    answer_questions(model, tok, questions[2:3], max_new_tokens=room)
    with pytest.raises(ValueError, match=r"q\.jsonl:3"):
        answer_questions(model, tok, questions[2:3], max_new_tokens=room + 1)


def test_soft_prompts_answer_and_take_room(tok: Tokenizer, questions: list[Question]) -> None:
    torch.manual_seed(0)
    config = ModelConfig(400, 32, 48, 2, 4, max_position_embeddings=128)
    soft = CausalLM(config)
    soft.init_weights(0.3)
    soft.eval()
    add_adapter(soft, PromptTuningConfig(num_virtual_tokens=5))
    found = answer_questions(soft, tok, questions, max_new_tokens=4, batch_size=3)
    want = [generate(soft, tok, list(q.messages), max_new_tokens=4) for q in questions]
    assert [answer.text for answer in found] == want
    widest = len(tok.encode_prompt(questions[2].messages))
    with pytest.raises(ValueError, match=r"tokens \+ 5 of the soft prompt \+"):
        answer_questions(soft, tok, questions, max_new_tokens=128 - widest - 4)
    with disable_adapters(soft):
        answer_questions(soft, tok, questions[2:3], max_new_tokens=128 - widest - 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"questions": []}, "there are no questions"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more; got 0"),
        ({"batch_size": 0}, "batch_size must be 1 or more; got 0"),
        (
            {"questions": [Question("a", "x", (), "f:1"), Question("a", "y", (), "f:2")]},
            "f:2: id 'a' is that of f:1 too",
        ),
    ],
)
def test_bad_options(
    options: dict[str, Any],
    message: str,
    model: CausalLM,
    tok: Tokenizer,
    questions: list[Question],
) -> None:
    with pytest.raises(ValueError, match=message):
        answer_questions(model, tok, **{"questions": questions, **options})


def test_a_question_that_the_template_refuses_is_named(
    model: CausalLM, tok: Tokenizer, questions: list[Question]
) -> None:
    twin = copy.deepcopy(tok)
    twin.chat_template = "{{ raise_exception('no ' ~ messages[0].content) }}"
    with pytest.raises(ValueError, match=r"^q\.jsonl:1: the chat template refuses: no a"):
        answer_questions(model, twin, questions)


# --- answers from elsewhere ---


def answers_file(tmp_path: Path, *rows: Any) -> Path:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_answers_meet_their_questions(questions: list[Question], tmp_path: Path) -> None:
    rows = [{"id": q.id, "answer": f"to {q.id}"} for q in reversed(questions)]
    found = read_answers(answers_file(tmp_path, *rows), questions)
    assert [(a.id, a.text) for a in found] == [(q.id, f"to {q.id}") for q in questions]
    assert found[1].references == questions[1].references
    bare = answers_file(tmp_path, *({"text": f"to {q.id}"} for q in questions))
    assert [a.text for a in read_answers(bare, questions)] == [a.text for a in found]


def test_answers_may_bring_their_own_references(tmp_path: Path) -> None:
    file = answers_file(
        tmp_path, {"answer": "", "references": "x"}, {"text": "b", "prompt": "p", "where": "f:9"}
    )
    assert read_answers(file) == [
        Answer("1", "", "", ("x",), f"{file}:1"),
        Answer("2", "p", "b", (), "f:9"),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"said": "x"}], r":1: an answer is a row with answer or text; keys are \['said'\]"),
        ([{"answer": None}], r":1: an answer is a row with answer or text"),
        ([{"answer": "x", "references": [1]}], r":1: references must be a list of strings"),
        ([{"answer": "x", "messages": [1]}], r":1: messages must be a list of turns or a text"),
        ([{"answer": "x", "id": 1}, {"answer": "y", "id": "1"}], r":2: id '1' is answered twice"),
        ([{"answer": "x"}], r": 1 answers without ids, and 7 questions; give the answers"),
        ([{"id": "q1", "answer": "x"}], r": no answer to 6 of 7 questions; the first is id 'q0'"),
        ([{"id": "q1", "answer": "x"}, {"answer": "y"}], r": 1 of 2 answers have an id"),
    ],
)
def test_what_is_no_answer_is_named(
    rows: list[Any], message: str, questions: list[Question], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"a\.jsonl{message}"):
        read_answers(answers_file(tmp_path, *rows), questions)


def test_answers_to_nothing_are_named(questions: list[Question], tmp_path: Path) -> None:
    rows = [{"id": name, "answer": "x"} for name in [*(q.id for q in questions), "other"]]
    with pytest.raises(ValueError, match="answers to no question: other"):
        read_answers(answers_file(tmp_path, *rows), questions)
