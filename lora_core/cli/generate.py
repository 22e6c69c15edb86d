"""`lora-core generate`: answer one prompt or one conversation, or chat.

On a terminal the answer appears as it is written (`--stream`); a program that reads the output gets
it whole. `--chat` is in chat.py.
"""

import argparse
import json
import sys
from typing import Any

from lora_core.cli.flags import add_dataclass_flags, add_opening_flags, given
from lora_core.models import Sampling
from lora_core.runs import check_no_heads, check_writes_text, open_heads, open_model
from lora_core.runs.heads import lines_of

HELP = "answer a prompt with a model and, if given, an adapter; or chat"
EXAMPLE = 'lora-core generate --adapter runs/mine --prompt "What does os.path.join do?"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_opening_flags(parser, adapter=False)
    parser.add_argument(
        "--adapter",
        metavar="[NAME=]DIR",
        action="append",
        default=[],
        help="adapter folder, as of finetune; --chat takes several, to switch between",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one user turn; - reads it from standard input")
    what.add_argument("--messages", metavar="JSON", help='[{"role": "user", "content": "…"}, …]')
    what.add_argument("--text", help="raw text to continue, no template")
    what.add_argument("--chat", action="store_true", help="a conversation; /help inside says more")
    what.add_argument(
        "--label",
        metavar="FILE.jsonl",
        help="print what trained heads (finetune --objective heads) say of each line",
    )
    parser.add_argument("--task", help="with --label: whose head; the file's name, or its kind")
    parser.add_argument("--system", help="a system turn before the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer [256]")
    add_dataclass_flags(parser, Sampling, title="sampling")
    parser.add_argument("--seed", type=int, help="of the sampling")
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends the answer; may be repeated"
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the answer as it is written [on a terminal]",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _conversation(args: argparse.Namespace) -> str | list[dict[str, Any]]:
    if args.text is not None:
        return str(args.text)
    if args.messages is not None:
        try:
            messages = json.loads(args.messages)
        except ValueError as error:
            raise ValueError(f"--messages is not valid JSON: {error}") from None
        if not isinstance(messages, list):
            raise ValueError("--messages must be a JSON list of {role, content} objects")
        return messages
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    system = [{"role": "system", "content": args.system}] if args.system else []
    return [*system, {"role": "user", "content": prompt}]


def _misuse(args: argparse.Namespace) -> str | None:
    """What flags say against one another."""
    if args.chat and args.json:
        return "--chat is for people: leave --json out"
    if args.system and (args.text is not None or args.messages is not None):
        return "--system goes with --prompt or --chat; raw text has no turns, --messages holds all"
    if len(args.adapter) > 1 and not args.chat:
        return f"one --adapter answers a prompt, got {len(args.adapter)}; --chat takes several"
    return None


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What `generate` is called with, checked before a model is loaded."""
    from lora_core.models.stopping import stop_strings

    sampling = given(args, Sampling)
    Sampling(**sampling)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1; got {args.max_new_tokens}")
    return {
        **sampling,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "stop": stop_strings(args.stop),
    }


def _stream(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _label(args: argparse.Namespace) -> int:
    """Print what heads say of each line of a file, as JSON Lines."""
    from lora_core.cli.chat import named

    folders = [named(text)[1] for text in args.adapter] or [args.model]
    base = args.model if args.adapter else None
    opened = open_heads(folders[0], base, device=args.device)
    for note in opened.notes:
        print(f"note: {note}", file=sys.stderr)
    for line in lines_of(opened.predict(args.label, args.task)):
        print(line)
    return 0


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    from lora_core.cli.chat import Chat, named, open_choices
    from lora_core.models import generate

    if (fault := _misuse(args)) is not None:
        print(f"lora-core generate: {fault}", file=sys.stderr)
        return 2
    if args.label is not None:
        return _label(args)
    options = _options(args)
    prompt = "" if args.chat else _conversation(args)
    adapters = [named(text) for text in args.adapter]
    first = adapters[0][1] if adapters else None
    check_no_heads(args.model, *(path for _, path in adapters))
    opened = open_model(args.model, first, quantize=args.quantize, device=args.device)
    check_writes_text(opened.model, opened.source)
    choices = open_choices(opened, adapters) if args.chat else {}
    for note in opened.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.chat:
        return Chat(opened, choices, options, system=args.system).run(sys.stdin, sys.stdout)
    streams = not args.json and (sys.stdout.isatty() if args.stream is None else args.stream)
    answer = generate(
        opened.model, opened.tok, prompt, on_text=_stream if streams else None, **options
    )
    if streams:
        print()
    else:
        print(json.dumps({"prompt": prompt, "answer": answer}) if args.json else answer)
    return 0
