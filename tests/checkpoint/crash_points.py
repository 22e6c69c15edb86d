"""Kill `save_model` at every system call that matters, and look at what it left.

Run by test_folder.py in a process of its own: it forks, and a fork wants a single thread.
Prints one letter a crash point: o (the old model is there), n (the new one), - (none).
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_core.checkpoint import folder, saving
from lora_core.models import CausalLM, ModelConfig

torch.set_num_threads(1)
CONFIG = ModelConfig(8, 8, 8, num_hidden_layers=1, num_attention_heads=2)
STEPS = (("replace", os), ("sync", saving), ("write_safetensors", saving))


def dying(real: Callable[..., Any], count: list[int]) -> Callable[..., Any]:
    """Like `real`, but the call that brings the count to zero kills the process instead."""

    def call(*args: Any) -> Any:
        count[0] -= 1
        if count[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    return call


def save_and_die(new: CausalLM, target: Path, at: int) -> bool:
    """Save in a child that dies at the given step; returns whether it got to the end."""
    child = os.fork()
    if child == 0:
        count = [at]
        for name, owner in STEPS:
            setattr(owner, name, dying(getattr(owner, name), count))
        folder.save_model(new, target, max_shard_size=300)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        raise RuntimeError(f"step {at}: the child ended with status {status}")
    return status == 0


def what_is_left(target: Path, models: dict[str, CausalLM]) -> str:
    """The letter of the model in `target`."""
    try:
        found = folder.load_model(target).state_dict()
    except FileNotFoundError as error:
        if "has no config.json" not in str(error):
            raise
        return "-"
    for letter, model in models.items():
        if all(torch.equal(found[name], value) for name, value in model.state_dict().items()):
            return letter
    raise RuntimeError("a mixture of the two models")


def main(root: Path) -> None:
    """Crash at step 1, 2, 3, … until a save gets through."""
    saving.sync = lambda path: None  # what was written outlives a killed process without it
    models = {letter: CausalLM(CONFIG) for letter in "on"}
    target, at, finished = root / "model", 0, False
    while not finished:
        at += 1
        shutil.rmtree(target, ignore_errors=True)
        folder.save_model(models["o"], target, max_shard_size=500)  # other shards than the new
        finished = save_and_die(models["n"], target, at)
        print(what_is_left(target, models), end="")
        folder.save_model(models["n"], target)  # the remains are no obstacle
        if what_is_left(target, models) != "n":
            raise RuntimeError(f"step {at}: saving again did not help")


main(Path(sys.argv[1]))
