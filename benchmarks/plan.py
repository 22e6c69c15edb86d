"""Is a plan right? Its peak beside the measured one, for one step after another of real runs.

    python -m benchmarks.plan                        # the shipped model, on the CPU
    python -m benchmarks.plan --shape 1B --tokens 256
    python -m benchmarks.plan --gpu --shape 8B --methods qlora --batch 2 --tokens 2048

Each run is a process of its own: `lora_core.train` for two steps of full rows, random ones for a
shape of `lora-core plan`'s list (weights are random too, in bfloat16 where they are frozen). What
is measured is the second step, in which the optimizer has its state.

On a GPU the measure is the allocator's own peak. On a CPU it is made up of the tensors alive before
the step, each storage once, and of every allocation and release of PyTorch's allocator during it,
as its profiler reports them, those inside operators included. Memory that libraries take for
themselves (OpenBLAS, oneDNN) goes past the allocator and is not counted; neither is Python.
"""

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import machine
from lora_core.adapters import LoRAConfig, add_adapter
from lora_core.checkpoint import base_model_path, load_model
from lora_core.models import CausalLM, ModelConfig
from lora_core.plan import Plan, model_named, plan
from lora_core.quant import quantize_model
from lora_core.train import TrainConfig, train

SHIPPED = "shipped"


@dataclass(frozen=True)
class Case:
    """One run."""

    shape: str = SHIPPED
    """a name of `lora-core plan`'s list, or "shipped" """
    method: str = "qlora"
    """full, lora or qlora"""
    batch: int = 4
    """rows"""
    tokens: int = 256
    """of a row"""
    dtype: str = "float32"
    """of the products"""
    checkpointing: bool = False
    """whether layers are recomputed"""
    optimizer: str = "adamw"
    """how its state is kept"""
    accumulate: int = 1
    """batches of a step"""
    device: str = "cpu"
    """cpu or cuda"""

    @property
    def weights(self) -> torch.dtype:
        """Dtype of what is not 4-bit."""
        wide = self.method == "full" or self.dtype == "float32"
        return torch.float32 if wide else torch.bfloat16

    @property
    def train(self) -> TrainConfig:
        """The run's settings."""
        return TrainConfig(
            steps=2,
            batch_size=self.batch,
            accumulate=self.accumulate,
            dtype=self.dtype,  # type: ignore[arg-type]  # checked by TrainConfig
            optimizer=self.optimizer,  # type: ignore[arg-type]
            activation_checkpointing=self.checkpointing,
            probe=False,
            progress=False,
        )

    @property
    def config(self) -> ModelConfig:
        """The model's sizes."""
        if self.shape == SHIPPED:
            return ModelConfig.from_folder(base_model_path())
        return model_named(self.shape)


def planned(case: Case) -> Plan:
    """The case's plan."""
    options: dict[str, Any] = {"tokens": case.tokens, "device": case.device}
    options["weights"] = case.weights
    return plan(case.config, case.method, LoRAConfig(), case.train, **options)


def build(case: Case) -> nn.Module:
    """The case's model with its adapter."""
    torch.manual_seed(0)
    device = torch.device(case.device)
    model: CausalLM
    if case.shape == SHIPPED:
        code = "nf4" if case.method == "qlora" else None
        model = load_model(base_model_path(), quantize=code, dtype=case.weights, device=device)
    else:
        with torch.device("meta"):
            model = CausalLM(case.config)
        model.to(case.weights).to_empty(device=device)
        model.tie_weights()
        model.init_weights()
        if case.method == "qlora":
            quantize_model(model)
    if case.method == "full":
        model.requires_grad_(True)
    else:
        add_adapter(model, LoRAConfig())
    return model


def alive() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    gc.collect()
    # not isinstance, which asks lazy objects for their class and so wakes them
    tensors = (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
    storages = (t.untyped_storage() for t in tensors)
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def measure(case: Case) -> int:
    """Peak of the second step, in bytes; in this process."""
    others = alive()
    model = build(case)
    vocabulary = case.config.vocab_size
    count = 2 * case.batch * case.accumulate
    ids = torch.randint(0, vocabulary, (count, case.tokens)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    watch = _Watch(case.device, others)
    train(model, rows, case.train, on_step=lambda record: watch.start(record["step"]))
    return watch.stop()


class _Watch:
    """The peak from the end of the first step on."""

    def __init__(self, device: str, others: int) -> None:
        self.on_gpu, self.before = device == "cuda", -others
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def start(self, step: int) -> None:
        if step != 1:
            return
        if self.on_gpu:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            return
        self.before += alive()
        self.profile.start()

    def stop(self) -> int:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated()
        self.profile.stop()
        assert self.profile.profiler is not None
        events = self.profile.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        now = peak = 0
        for _, change in sorted(changes, key=lambda at: at[0]):
            now += change
            peak = max(peak, now)
        return self.before + peak


def measured(case: Case) -> int:
    """`measure` in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.plan", "--one", json.dumps(dataclasses.asdict(case))]
    env = {**os.environ, "KINETO_LOG_LEVEL": "99"}
    env.pop("PYTHONSAFEPATH", None)
    root = Path(__file__).parents[1]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-2000:]}")
    return int(done.stdout.strip().splitlines()[-1])


def compare(case: Case) -> dict[str, Any]:
    """Plan and measurement of a case."""
    told, real = planned(case), measured(case)
    return {
        **dataclasses.asdict(case),
        "planned": told.peak,
        "at": told.at,
        "measured": real,
        "ratio": told.peak / real,
    }


def main() -> None:
    """Compare all cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--shape", default=SHIPPED)
    parser.add_argument("--methods", nargs="+", default=["lora", "qlora", "full"])
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=None)
    parser.add_argument("--optimizers", nargs="+", default=["adamw"])
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    if args.one:
        print(measure(Case(**json.loads(args.one))))
        return
    print(json.dumps(machine()))
    small = args.shape == SHIPPED
    dtypes = args.dtypes or (["float32", "bfloat16"] if small and not args.gpu else ["bfloat16"])
    batch = args.batch or (4 if small else 1)
    device = "cuda" if args.gpu else "cpu"
    for dtype in dtypes:
        for method in args.methods:
            for optimizer in args.optimizers:
                for on in (False, True):
                    options = {"dtype": dtype, "checkpointing": on, "optimizer": optimizer}
                    case = Case(args.shape, method, batch, args.tokens, device=device, **options)
                    show(compare(case))


def show(result: dict[str, Any]) -> None:
    """One line for the reader."""
    on = "checkpointing" if result["checkpointing"] else "plain"
    print(
        f"{result['shape']:>8} {result['method']:>6} {result['batch']} × {result['tokens']} "
        f"{result['dtype']:>8} {result['optimizer']:>9} {on:>13}: plan "
        f"{result['planned'] / 1e6:9.1f} MB, measured {result['measured'] / 1e6:9.1f} MB, "
        f"ratio {result['ratio']:.3f} (peak in {result['at']})",
        flush=True,
    )


if __name__ == "__main__":
    main()
