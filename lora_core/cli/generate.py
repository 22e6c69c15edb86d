"""`lora-core generate`: answer one prompt or one conversation."""

import argparse
import json
import sys
from typing import Any

from lora_core.cli.opening import add_opening_flags, open_model

HELP = "answer a prompt with a model and, if given, an adapter"
EXAMPLE = 'lora-core generate --adapter runs/mine --prompt "What does os.path.join do?"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    add_opening_flags(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one user turn; - reads it from standard input")
    what.add_argument("--messages", metavar="JSON", help='[{"role": "user", "content": "…"}, …]')
    what.add_argument("--text", help="raw text to continue, no template")
    parser.add_argument("--system", help="a system turn before the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer [256]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of the sampling [1]")
    parser.add_argument("--seed", type=int, help="of the sampling")
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


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    from lora_core.models import generate

    prompt = _conversation(args)
    opened = open_model(args.model, args.adapter, quantize=args.quantize, device=args.device)
    for note in opened.notes:
        print(f"note: {note}", file=sys.stderr)
    answer = generate(
        opened.model,
        opened.tok,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    print(json.dumps({"prompt": prompt, "answer": answer}) if args.json else answer)
    return 0
