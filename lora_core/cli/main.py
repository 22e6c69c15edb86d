"""The dispatcher behind `lora-core`: a verb's module is imported only when that verb is called.

A verb is a module with `HELP` (one line), `EXAMPLE` (one command), `add_arguments(parser)` and
`run(args) -> exit code`. Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted. What a user
can mend (a wrong value, a missing file) arrives here as ValueError, TypeError, OSError or
ImportError and leaves as one line; `LORA_CORE_TRACEBACK=1` shows where it was raised. Anything
else is a fault of the library and keeps its traceback.
"""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

VERBS = {
    "quickstart": "the whole path on the model that ships with the package, in minutes",
    "finetune": "train an adapter (or a whole model) on JSONL conversations",
    "pretrain": "train a small model and its tokenizer from plain text",
    "generate": "answer a prompt with a model and, if given, an adapter",
    "sample": "answers of a model to prompts, the good ones as rows to train on",
    "evaluate": "figures with intervals: loss, answers, a golden set, what was forgotten",
    "compare": "prompting and every way of tuning on one task: quality, forgetting, cost",
    "merge": "fold an adapter into its base and write a Hugging Face folder",
    "export": "write a copy of a LoRA adapter that vLLM, llama.cpp and SGLang scale right",
    "quantize": "write a model with its linear layers in 4 bits, in bitsandbytes' format",
    "inspect": "samples token by token with their labels and grades; an adapter's update by layer",
    "plan": "memory before a run: each part and the peak, by method; what fits a budget",
    "info": "versions, backends and what this machine can run",
}


def load_verb(name: str) -> ModuleType:
    """The module of a verb."""
    return importlib.import_module(f"lora_core.cli.{name}")


def build_parser(verb: str) -> argparse.ArgumentParser:
    """The parser of one verb, with its example at the end of `--help`."""
    module = load_verb(verb)
    parser = argparse.ArgumentParser(
        prog=f"lora-core {verb}",
        description=module.HELP,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {text}" for name, text in VERBS.items()]
    return "\n".join(
        ["usage: lora-core VERB [options]", "", "verbs:", *lines, "", "lora-core VERB --help: more"]
    )


def _one_line_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the words after `lora-core`; the process's own by default.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    verb = words[0]
    if verb not in VERBS:
        print(f"lora-core: no verb {verb!r}; one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        args = build_parser(verb).parse_args(words[1:])
    except SystemExit as stop:  # argparse's own way out: 0 for --help, 2 for bad usage
        return int(stop.code or 0)
    show_traceback = os.environ.get("LORA_CORE_TRACEBACK") == "1"
    try:
        with warnings.catch_warnings():
            if not show_traceback:
                warnings.showwarning = _one_line_warning
            return int(load_verb(verb).run(args))
    except KeyboardInterrupt:
        print(f"lora-core {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lora-core inspect … | head` closed the pipe: not a failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        if show_traceback:
            raise
        print(f"lora-core {verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
