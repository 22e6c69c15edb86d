"""Three tasks on the shipped base: trained jointly, in turn, and apart; what is forgotten.

    python -m benchmarks.tasks                 # about 5 minutes on 2 cores
    python -m benchmarks.tasks --quick         # toy counts: that it runs, not what is true
    python -m benchmarks.tasks --write         # the newest result into docs/tasks.md

The tasks are made from Python's own modules, which the base has read:

    origin      a function's signature and summary -> which of 8 packages it is from   (sequence)
    parts       a line of source -> for each of its words what part it plays           (token)
    defaults    "The default of `timeout`?" and a signature -> that argument's default (span)

Each plan's result is kept in `--out` as it ends, and a call that was stopped goes on. Results of
`--quick`, or of counts of one's own, go to `--out` and never into the page.
"""

import argparse
import ast
import io
import json
import keyword
import random
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, machine, record
from benchmarks.papers.page import cell, table
from lora_core.adapters import LoRAConfig
from lora_core.checkpoint import base_model_path, load_model
from lora_core.data import load_tokenizer
from lora_core.data.stdlib import Function, functions, read_modules
from lora_core.data.task_rows import TaskData, read_task
from lora_core.files import sha256_file
from lora_core.models.multi_head import MultiHead
from lora_core.models.task_heads import Head, HeadShape
from lora_core.tasks import Comparison, Task, compare_tasks, head_scores
from lora_core.train import TrainConfig

FILE = RESULTS / "tasks.jsonl"
PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
MARK = ("<!-- tasks: made by `python -m benchmarks.tasks --write` -->", "<!-- end of tasks -->")
PACKAGES = 8
MAX_LENGTH = 80  # tokens of a row
Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Counts of a run."""

    rows: int = 1200
    """of each task, to train on"""
    held_out: int = 200
    """of each task, to score"""
    steps: int = 60
    """of each task to itself"""
    batch_size: int = 8
    """rows in a batch; a step has three"""


QUICK = Sizes(12, 6, 1, 2)
QUICK_MODULES = ("argparse", "email.message", "heapq", "json", "logging", "shutil", "tarfile")


def origin_rows(found: Sequence[Function]) -> Iterator[Row]:
    """Which package a function is from, of those with most functions."""
    counts = Counter(f.module.split(".")[0] for f in found)
    # by name where as many have as many
    kept = sorted(counts, key=lambda name: (-counts[name], name))[:PACKAGES]
    for f in found:
        if (package := f.module.split(".")[0]) in kept:
            text = f"{f.last_name}{f.signature}\n{f.summary}"
            yield {"text": text[:240], "label": package}


def part_rows(lines: Sequence[str]) -> Iterator[Row]:
    """The words of a line, as Python's tokenizer cuts it, and the part each plays."""
    for line in lines:
        try:
            found = list(tokenize.generate_tokens(io.StringIO(line.strip()).readline))
        except (tokenize.TokenError, SyntaxError):
            continue
        words = [t for t in found if t.string.strip() and " " not in t.string]
        tags = [_part(t, words[at - 1] if at else None) for at, t in enumerate(words)]
        if 5 <= len(words) <= 24 and len(set(tags)) > 2:
            yield {"tokens": [t.string for t in words], "tags": tags}


def _part(token: tokenize.TokenInfo, before: tokenize.TokenInfo | None) -> str:
    """What a word is, by itself and by the word before it."""
    if token.type != tokenize.NAME:
        kinds = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.OP: "operator"}
        return kinds.get(token.type, "other")
    if keyword.iskeyword(token.string):
        return "keyword"
    place = {".": "attribute", "def": "definition", "class": "definition", "import": "module"}
    return place.get("" if before is None else before.string, "name")


def default_rows(found: Sequence[Function]) -> Iterator[Row]:
    """An argument's default, as it stands in a signature that has several."""
    for f in found:
        context = f"{f.last_name}{f.signature}"
        arguments = ast.parse(f"def f{f.signature}: ...").body[0].args  # type: ignore[attr-defined]
        named = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        values = [ast.unparse(value) for value in arguments.defaults]
        pairs = list(zip(named[len(named) - len(values) :], values, strict=True))
        if len(pairs) < 2 or len(context) > 160:
            continue
        for name, value in pairs:
            if context.count(f"{name}={value}") == 1:
                at = context.index(f"{name}={value}") + len(name) + 1
                answers = {"text": [value], "answer_start": [at]}
                question = f"The default of `{name}`?"
                yield {"question": question, "context": context, "answers": answers}


def different(rows: Iterator[Row], seed: int) -> list[Row]:
    """Rows whose inputs differ, shuffled: so a row held out is in no row trained on."""
    found = {}
    for row in rows:
        inputs = {key: row[key] for key in ("text", "tokens", "question", "context") if key in row}
        found.setdefault(json.dumps(inputs), row)
    kept = list(found.values())
    random.Random(seed).shuffle(kept)
    return kept


def make_rows(seed: int, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, list[Row]]:
    """Each task's rows, from the running interpreter's modules."""
    modules = read_modules(wanted=wanted)
    found = [f for module in modules for f in functions(module) if f.is_public]
    lines = [line for module in modules for line in module.text.splitlines()[::7]]
    made = {
        "origin": origin_rows(found),
        "parts": part_rows(lines),
        "defaults": default_rows(found),
    }
    return {name: different(rows, seed) for name, rows in made.items()}


def labels_of(row: Row) -> set[str]:
    """The labels that a row names."""
    return {row["label"]} if "label" in row else set(row.get("tags", ()))


def read_tasks(folder: Path, sizes: Sizes, seed: int) -> dict[str, tuple[TaskData, TaskData]]:
    """Each task's rows to train on and to score, through files as a user's data."""
    folder.mkdir(parents=True, exist_ok=True)
    tok, tasks = load_tokenizer(base_model_path()), {}
    quick = sizes.rows == QUICK.rows
    for name, rows in make_rows(seed, lambda n: not quick or n in QUICK_MODULES).items():
        kept = rows[sizes.held_out : sizes.held_out + sizes.rows]
        parts: list[TaskData] = []
        seen = {label for row in kept for label in labels_of(row)}
        # toy counts may hold out a label that is not trained on
        held = [row for row in rows[: sizes.held_out] if labels_of(row) <= seen]
        for kind, some in (("train", kept), ("held-out", held)):
            path = folder / f"{name}.{kind}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
            like = parts[0] if parts else None
            parts.append(read_task(path, tok, name, MAX_LENGTH, like=like, overlap=16))
        tasks[name] = (parts[0], parts[1])
    return tasks


def run(folder: Path, sizes: Sizes, seed: int) -> Comparison:
    """All plans on the shipped base."""
    tasks = read_tasks(folder / "data", sizes, seed)

    def make() -> MultiHead:
        backbone = load_model(base_model_path(), dtype=torch.float32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = {
                name: Head(HeadShape(kind=task.kind, labels=tuple(task.labels)), 256)
                for name, (task, _) in tasks.items()
            }
        return MultiHead(backbone, heads)

    return compare_tasks(
        make,
        [
            Task(name=name, data=task, score=head_scores(held_out))
            for name, (task, held_out) in tasks.items()
        ],
        LoRAConfig(r=16, alpha=32),
        TrainConfig(
            steps=sizes.steps,
            batch_size=sizes.batch_size,
            accumulate=len(tasks),
            lr=1e-3,
            seed=seed,
            progress=False,
        ),
        out=folder,
        facts={"data": {p.name: sha256_file(p) for p in sorted((folder / "data").iterdir())}},
        say=lambda line: print(f"  {line}", flush=True),
    )


def facts(found: Comparison) -> dict[str, Any]:
    """The comparison as JSON holds it."""
    plans = {}
    for plan, outcome in found.outcomes.items():
        scores = {task: value.facts() for task, value in found.scores(plan).items()}
        row = {"steps": outcome.steps, "seconds": outcome.seconds, "scores": scores}
        row |= {"average": found.average(plan).facts(), "figures": outcome.figures}
        if len(outcome.stages) > 1:
            matrix = [[value.facts() for value in line] for line in found.matrix(plan)]
            row |= {"matrix": matrix, "forgetting": found.forgetting(plan).facts()}
            row |= {"backward_transfer": found.backward_transfer(plan).facts()}
        if plan != "joint":
            row["over_joint"] = {t: found.difference(plan, "joint", t).facts() for t in found.tasks}
        plans[plan] = row
    return {"tasks": list(found.tasks), "plans": plans}


def generated(found: Mapping[str, Any] | None) -> str:
    """The part of the page between the marks."""
    if found is None:
        return "No result yet: run the command."
    lines = ["```console", f"$ {found['command']}", "```", ""]
    rows = []
    for plan, row in found["plans"].items():
        line = {"plan": plan, **row["scores"], "average": row["average"]}
        for name in ("forgetting", "backward_transfer"):
            line[name.replace("_", " ")] = row.get(name, "")
        rows.append(line | {"steps": row["steps"], "seconds": f"{row['seconds']:.0f}"})
    lines += [*table(rows), "", "Score on each task after each stage of `sequential` training:", ""]
    stages = found["plans"]["sequential"]["matrix"]
    lines += table(
        [
            {"after": task, **dict(zip(found["tasks"], stage, strict=True))}
            for task, stage in zip(found["tasks"], stages, strict=True)
        ]
    )
    lines += ["", "Over `joint`, row by row:", ""]
    others = [(plan, row) for plan, row in found["plans"].items() if "over_joint" in row]
    lines += table([{"plan": plan, **row["over_joint"]} for plan, row in others])
    surgery = found["plans"]["joint-pcgrad"]["figures"]
    if surgery:
        share, mean = surgery["conflicts"], cell(surgery["cosine"])
        lines += ["", f"Pairs of tasks with a negative cosine: {share:.1%}; mean cosine {mean}."]
    where = found["machine"]
    return "\n".join(
        [*lines, "", f"{found['seconds']:.0f} s on {where['machine']}, {where['threads']} threads."]
    )


def newest(file: Path = FILE) -> dict[str, Any] | None:
    """The last result of a file; None where there is none."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return json.loads(lines[-1]) if lines else None


def write_page() -> None:
    """Put the newest result between the marks of docs/tasks.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARK[0])
    after = rest.split(MARK[1])[1]
    PAGE.write_text(f"{before}{MARK[0]}\n{generated(newest())}\n{MARK[1]}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", metavar="DIR", default="runs/tasks", help="[runs/tasks]")
    made.add_argument("--seed", type=int, default=0, help="[0]")
    made.add_argument("--steps", type=int, help=f"of each task [{Sizes.steps}]")
    made.add_argument("--quick", action="store_true", help="toy counts")
    made.add_argument("--write", action="store_true", help="write docs/tasks.md; runs nothing")
    args = made.parse_args(arguments)
    if args.write:
        write_page()
        return 0
    sizes = QUICK if args.quick else Sizes()
    own = args.quick or args.steps is not None
    if args.steps is not None:
        sizes = Sizes(sizes.rows, sizes.held_out, args.steps, sizes.batch_size)
    start, out = time.perf_counter(), Path(args.out)
    found = run(out, sizes, args.seed)
    command = "python -m benchmarks.tasks" + (" --quick" if args.quick else "")
    for flag in ("seed", "steps"):
        if value := getattr(args, flag):
            command += f" --{flag} {value}"
    row = facts(found) | {"command": command, "sizes": asdict(sizes), "machine": machine()}
    row["seconds"] = time.perf_counter() - start
    record(out / "tasks.jsonl" if own else FILE, [row])
    print(generated(row))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
