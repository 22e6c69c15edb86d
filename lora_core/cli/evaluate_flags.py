"""The flags of `lora-core evaluate`, and which of them go together.

The verb has four forms, by what there is to judge: a model, answers written before, two files of
answers to a judge, two files of answers to the person at the terminal. A flag of one form in
another is bad usage, said in one line before anything is loaded.
"""

import argparse
from pathlib import Path

from lora_core.cli.flags import add_opening_flags

_OF_A_MODEL = ("model", "adapter", "quantize", "compare_base", "general", "choices")
_OF_ANSWERS = ("metrics", "encoder")
_OF_PROMPTS = ("system", "shots", "shots_data", "max_new_tokens")
_OF_GOLDEN = ("golden", "against", "save")
_WORK = ("data", "answers", "choices", "general", "golden", "blind")
MAX_NEW_TOKENS = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_opening_flags(parser.add_argument_group("the model"))
    _add_data(parser.add_argument_group("loss, perplexity and accuracy on graded tokens"))
    _add_answers(parser.add_argument_group("answers, and what they are worth"))
    _add_more(parser.add_argument_group("other measures of a model"))
    _add_pairs(parser.add_argument_group("two files of answers, without a model"))
    out = parser.add_argument_group("results")
    out.add_argument(
        "--out",
        metavar="DIR",
        help="folder for answers.jsonl, kept as they come, and metrics.json; a second call goes "
        "on; with --blind or --judge: the file of the votes or verdicts",
    )
    out.add_argument("--html", metavar="FILE", help="write a report, one page that needs no other")
    out.add_argument("--json", action="store_true", help="print one JSON object")


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data", metavar="FILE", help="JSONL file: what is graded, and what is asked")
    add("--template", help="built-in name, file or Jinja text [the tokenizer's]")
    add("--columns", help="names of the data's fields: prompt=question,…")
    add("--train-on", choices=["assistant", "last", "all"], default="assistant")
    add("--max-length", type=int, default=2048, help="longest row, tokens [2048]")
    add("--batch-size", type=int, default=8, help="rows at a time, of answers too [8]")
    add("--limit", type=int, metavar="N", help="only the first so many rows")
    add("--no-loss", action="store_true", help="leave these out: for rows that hold no answer")


def _add_answers(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--metrics",
        metavar="NAME,…",
        help="answer each row's last user turn, greedily, and score the answers: exact, f1, bleu, "
        "rouge, distinct, repetition, bertscore, embedding",
    )
    add("--encoder", metavar="DIR", help="encoder folder, for bertscore and embedding")
    add("--max-new-tokens", type=int, metavar="N", help=f"longest answer [{MAX_NEW_TOKENS}]")
    add("--system", metavar="TEXT", help="system turn, in place of the rows' own")
    add("--shots", type=int, metavar="N", help="so many examples before each question")
    add("--shots-data", metavar="FILE", help="JSONL file whose first rows are the examples")
    add("--answers", metavar="FILE", help="score these answers (id, answer) instead of a model's")


def _add_more(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--compare-base", action="store_true", help="all of it without the adapter too, paired")
    add("--choices", metavar="FILE", help="JSONL of questions with choices: accuracy by likelihood")
    add(
        "--general",
        nargs="?",
        const="",
        metavar="FILE",
        help="bits per byte of general text, with the adapter and without: what was forgotten "
        "[modules of Python's library]",
    )
    add("--golden", metavar="FILE", help="frozen prompts and what their answers must hold")
    add("--against", metavar="FILE", help="an earlier result of --golden: exit 1 on a regression")
    add("--save", metavar="FILE", help="keep the result of --golden")


def _add_pairs(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--judge", metavar="MODULE:FUNCTION", help="compare --answers with --versus by a function")
    add("--versus", metavar="FILE", help="the other answers, for --judge")
    add("--blind", nargs=2, metavar="FILE", help="vote yourself, not knowing whose answer is whose")
    add("--seed", type=int, default=0, help="of the order in which --blind shows answers [0]")


def misuse(args: argparse.Namespace) -> str | None:
    """What flags say against one another; None where they agree."""
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    if not given & set(_WORK):
        return "nothing to evaluate: give --data, --choices, --general, --golden, --answers …"
    if args.blind is not None:
        return _misuse_of_blind(given)
    if args.judge is not None or args.versus is not None:
        return _misuse_of_judge(given)
    for flag, needed in (("against", "golden"), ("save", "golden"), ("compare_base", "adapter")):
        if flag in given and needed not in given:
            return f"{_flag(flag)} needs {_flag(needed)}"
    return _misuse_of_answers(args, given) or _misuse_of_metrics(args, given)


def check_values(args: argparse.Namespace) -> None:
    """Refuse counts below 1, and results that would have no place to go after an hour's work.

    Raises:
        ValueError: a count below 1.
        OSError: no folder for a result, or a folder where a file belongs, or the other way round.
    """
    for name in ("limit", "max_new_tokens", "shots", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{_flag(name)} must be 1 or more; got {value}")
    files = ["html", "save", *(["out"] if args.blind or args.judge else [])]
    for name in files:
        value = getattr(args, name)
        if value is not None and not Path(value).absolute().parent.is_dir():
            raise FileNotFoundError(
                f"{_flag(name)} {value}: there is no folder {Path(value).parent}"
            )
        if value is not None and Path(value).is_dir():
            raise IsADirectoryError(f"{_flag(name)} {value} is a folder: name a file")
    if args.out is not None and "out" not in files and Path(args.out).is_file():
        raise NotADirectoryError(f"--out {args.out} is a file: name a folder")


def _misuse_of_blind(given: set[str]) -> str | None:
    spare = given & {*_OF_A_MODEL, *_OF_ANSWERS, *_OF_PROMPTS, *_OF_GOLDEN, "judge", "versus"}
    spare |= given & {"answers", "html", "json", "no_loss", "template"}
    if spare:
        return f"--blind asks a person about two files: leave out {_flags(spare)}"
    return None if "out" in given else "--blind needs --out FILE for the votes"


def _misuse_of_judge(given: set[str]) -> str | None:
    missing = {"judge", "answers", "versus"} - given
    if missing:
        return f"a judge compares --answers with --versus: {_flags(missing)} missing"
    spare = given & {*_OF_A_MODEL, *_OF_ANSWERS, *_OF_PROMPTS, *_OF_GOLDEN, "html", "no_loss"}
    return f"--judge compares two files: leave out {_flags(spare)}" if spare else None


def _misuse_of_answers(args: argparse.Namespace, given: set[str]) -> str | None:
    if args.answers is None:
        return None
    spare = given & {*_OF_A_MODEL, *_OF_PROMPTS, *_OF_GOLDEN, "no_loss", "template"}
    if spare:
        return f"--answers scores what was written before: leave out {_flags(spare)}"
    return None if args.metrics is not None else "--answers needs --metrics (or --judge)"


def _misuse_of_metrics(args: argparse.Namespace, given: set[str]) -> str | None:
    from lora_core.evaluate.metrics import check_metrics

    if args.metrics is None:
        spare = given & {"shots", "shots_data", "encoder"}
        if "golden" not in given:
            spare |= given & {"system", "max_new_tokens"}
        if spare:
            return f"{_flags(spare)}: no answer is asked for; give --metrics"
        return "--no-loss leaves nothing to do with --data" if "no_loss" in given else None
    if not given & {"data", "answers"}:
        return "--metrics needs --data (whose questions are answered) or --answers"
    if ("shots" in given) != ("shots_data" in given):
        return "--shots N and --shots-data FILE go together"
    try:
        check_metrics(args.metrics.split(","), encoder=args.encoder is not None)
    except ValueError as error:
        return str(error)
    return None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _flags(names: set[str]) -> str:
    return ", ".join(map(_flag, sorted(names)))
