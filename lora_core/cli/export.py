"""`lora-core export`: a copy of a LoRA adapter that other programs read right.

vLLM, llama.cpp and SGLang read PEFT's files, but not all that they say of rank and scaling. With
`--baked` the scaling is in B and nothing is left to misread; the copy is read back by each
program's own rules and compared. What such a program has no place for is refused with the reason.
"""

import argparse
import json
from pathlib import Path

import torch

from lora_core.adapters import unload_adapters
from lora_core.checkpoint import export_adapter
from lora_core.checkpoint.loaders import LOADERS
from lora_core.runs.opening import open_model

HELP = "write a copy of a LoRA adapter that vLLM, llama.cpp and SGLang scale right"
EXAMPLE = "lora-core export --adapter runs/mine --out runs/mine-vllm --baked --for vllm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--adapter", metavar="DIR", required=True, help="adapter folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write; must be new")
    parser.add_argument(
        "--baked", action="store_true", help="fold the scaling into B, and give all one rank"
    )
    parser.add_argument(
        "--for",
        dest="loader",
        choices=sorted(LOADERS),
        help="refuse what this program does not read [say who does not]",
    )
    parser.add_argument("--rank", type=int, metavar="N", help="the one rank [the largest there is]")
    parser.add_argument(
        "--to-lora",
        type=int,
        metavar="N",
        help="make a plain LoRA of rank N or less first, by SVD; the error is printed",
    )
    parser.add_argument(
        "--model", metavar="DIR", help="base folder, for --to-lora [the one the adapter names]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Export, and say who reads it how."""
    model = None
    if args.to_lora is not None:
        model = open_model(args.model, args.adapter).model
        unload_adapters(model)
    with torch.no_grad():
        report = export_adapter(
            args.adapter,
            args.out,
            bake=args.baked,
            loader=args.loader,
            rank=args.rank,
            to_lora=args.to_lora,
            model=model,
        )
    if args.json:
        conversion = None if report.conversion is None else report.conversion.as_dict()
        facts = {**vars(report), "directory": str(Path(args.out)), "conversion": conversion}
        print(json.dumps(facts))
    else:
        print(report)
    return 0
