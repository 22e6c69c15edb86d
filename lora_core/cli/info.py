"""`lora-core info`: what is installed, what this machine can run, and which backend answers."""

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

import lora_kernels

HELP = "versions, backends and what this machine can run"
EXAMPLE = "lora-core info --json"
PACKAGES = ("torch", "triton", "safetensors", "tokenizers", "numpy", "jinja2", "tqdm", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _base_model() -> str:
    """Where the shipped model is, or what is wrong with it: `info` is for broken installations."""
    from lora_core.checkpoint import base_model_path

    try:
        return str(base_model_path())
    except FileNotFoundError as error:
        return str(error)


def gather() -> dict[str, Any]:
    """Everything that `info` prints, as plain data."""
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "lora-core": _version("lora-core"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "devices": devices,
        "backends": lora_kernels.describe(),
        "base model": _base_model(),
    }


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    facts = gather()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, text in value.items():
                print(f"  {name:<12} {text}")
        else:
            print(f"{key + ':':<12} {', '.join(value) if isinstance(value, list) else value}")
    return 0
