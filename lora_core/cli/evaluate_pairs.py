"""Answers that are written already: scored, put before a judge in pairs, or before the user.

No model is loaded. Answers are joined to their questions by id, or by their order where they have
none; where `--data` is not given, the questions are those that stand in the first file.
"""

import argparse
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_core.cli.evaluate_model import Findings, Side, notes_on, open_encoder
from lora_core.cli.evaluate_show import as_json, as_text
from lora_core.cli.evaluate_work import bar
from lora_core.data import parse_columns
from lora_core.evaluate.answers import Answer, read_answers
from lora_core.evaluate.blind import BlindTest
from lora_core.evaluate.judge import WinRate, pairwise
from lora_core.evaluate.metrics import check_references, metric_figures
from lora_core.evaluate.questions import Question, read_questions
from lora_core.files import atomic_write, sha256_file


def run_on_answers(args: argparse.Namespace) -> int:
    """Score, judge or vote, as the flags say; gives the exit code."""
    if args.blind is not None:
        return _vote(args)
    if args.judge is not None:
        return _judge(args)
    return _score(args)


def _questions(args: argparse.Namespace) -> list[Question] | None:
    if args.data is None:
        return None
    columns = None if args.columns is None else parse_columns(args.columns)
    return read_questions(args.data, columns)


def _both(
    args: argparse.Namespace, one: str, other: str
) -> tuple[list[Question], list[Answer], list[Answer]]:
    """The questions, and two systems' answers to them, in one order."""
    questions = _questions(args)
    a = read_answers(one, questions)
    if questions is None:
        questions = [Question(x.id, x.messages, x.references, x.where) for x in a]
    b = read_answers(other, questions)
    return questions[: args.limit], a[: args.limit], b[: args.limit]


def _score(args: argparse.Namespace) -> int:
    names = args.metrics.split(",")
    answers = read_answers(args.answers, _questions(args))[: args.limit]
    check_references(answers, names)
    encoder = open_encoder(args)
    found = Findings({"answers": args.answers, "data": args.data})
    found.notes = notes_on(answers, "answers")
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    found.side = Side(metric_figures(answers, names, encoder), answers)
    facts = json.dumps(as_json(found), ensure_ascii=False)
    if args.out is not None:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        atomic_write(Path(args.out) / "metrics.json", facts + "\n")
    print(facts if args.json else as_text(found))
    if args.html is not None:
        from lora_core.cli.evaluate_html import write_page

        write_page(args.html, found)
    return 0


def _judge(args: argparse.Namespace) -> int:
    judge = load_judge(args.judge)
    questions, a, b = _both(args, args.answers, args.versus)
    names = _names(args.answers, args.versus)
    found = pairwise(
        judge,
        questions,
        [answer.text for answer in a],
        [answer.text for answer in b],
        out=args.out,
        names=names,
        bound=judge_source(args.judge, judge),
        progress=bar("pairs", "pairs"),
    )
    print(json.dumps(_judged(found, args), ensure_ascii=False) if args.json else found)
    return 0


def _judged(found: WinRate, args: argparse.Namespace) -> dict[str, Any]:
    """A win rate as JSON holds it."""
    parts = {
        "win_rate": found.rate,
        "decided": found.decided,
        "inconsistent": found.inconsistent,
        "first_preferred": found.first_preferred,
    }
    return {
        "judge": args.judge,
        "answers": args.answers,
        "versus": args.versus,
        "wins": found.wins,
        "losses": found.losses,
        "ties": found.ties,
        "errors": list(found.errors),
        **{name: None if x is None else x.facts() for name, x in parts.items()},
    }


def _vote(args: argparse.Namespace) -> int:
    """Ask the person at the terminal."""
    one, other = args.blind
    questions, a, b = _both(args, one, other)
    first, second = ([answer.text for answer in side] for side in (a, b))
    BlindTest(questions, first, second, args.seed, args.out, names=_names(one, other)).run()
    return 0


def load_judge(name: str) -> Callable[..., Any]:
    """The function that `module:function` names; the working folder's modules are found too.

    Raises:
        ValueError: not of this form, or the module has no such function.
        ImportError: no such module, or it fails on import.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"--judge takes MODULE:FUNCTION, as in judges:shorter; got {name!r}")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"--judge {name}: {error}") from error
    except (Exception, SystemExit) as error:  # a script may end the process
        raise ImportError(
            f"--judge {name}: importing {module} failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(here)
    judge = getattr(loaded, attribute, None)
    if not callable(judge):
        kind = "no" if judge is None else f"a {type(judge).__name__} and no function"
        raise ValueError(f"--judge {name}: {module} has {kind} {attribute!r}")
    return judge


def judge_source(name: str, judge: Callable[..., Any]) -> dict[str, Any]:
    """What verdicts are bound to: the judge's name and hashes of the files that it is written in.

    Questions and answers need no hash here, a verdict is looked up by their texts. What the judge
    imports, or a service that it calls, is not seen: after a change there, take another `--out`.
    """
    module = sys.modules[name.partition(":")[0]]
    files = {getattr(module, "__file__", None)}
    try:
        files.add(inspect.getsourcefile(inspect.unwrap(judge)))
    except TypeError:  # built in, or an object that is called
        files.add(getattr(sys.modules.get(type(judge).__module__), "__file__", None))
    hashes = {sha256_file(file) for file in files if file is not None and Path(file).is_file()}
    return {"judge": name, "source": sorted(hashes)}


def _names(one: str, other: str) -> tuple[str, str]:
    """Short names of two files that tell them apart."""
    first, second = Path(one), Path(other)
    for a, b in ((first.stem, second.stem), (first.parent.name, second.parent.name)):
        if a and b and a != b:
            return a, b
    return (one, other) if one != other else (f"{one} (1)", f"{other} (2)")
