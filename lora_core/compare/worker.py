r"""One variant, from the base to its figures; run as a process of its own.

    python -m lora_core.compare.worker SPEC.json RESULT.json

A process of its own makes three things true: the peak memory is this variant's and no other's, a
crash or an end for want of memory takes nothing else along, and every variant starts from the same
state. The price is some seconds for each to import torch and load the base.

    base ─▶ attach, train ─▶ peak memory ─▶ save ─▶ general text ─▶ answers, loss ─▶ latency

The peak is read right after the training, before answers are generated, so that it is that of
loading and training, as a training run's would be. A variant that trains nothing has that of
loading and answering. What the interpreter with torch had taken before the base was loaded is
subtracted, and the whole is given beside it.

What fails is one line under "failed" in RESULT.json, and the traceback goes to stderr, which the
parent keeps as a log.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core.adapters import add_adapter, parameter_counts
from lora_core.checkpoint import load_model, save_adapter, save_model
from lora_core.compare import measures
from lora_core.compare.latency import measure_latency, why_unmergeable
from lora_core.compare.task import Task, asked_questions
from lora_core.compare.variants import METHODS, Variant
from lora_core.data import SFTDataset, Tokenizer, load_tokenizer
from lora_core.device import out_of_memory, peak_memory, resident_dtype
from lora_core.evaluate.answering import prompt_of
from lora_core.files import atomic_write
from lora_core.runs import check_writes_text
from lora_core.runs.opening import device_named
from lora_core.train import TrainConfig, TrainResult, train

BASE = "base"  # the job that measures the base for all others
_POINTS = 200  # of a loss curve that is kept


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Run one variant, or the base's own measurement.

    Args:
        spec: "task", "folder" and either "variant" None (the base) or the variant's facts, with
            "base" (what the base's job returned), "shots", "system" and "mark".

    Returns:
        Its figures, as JSON holds them.

    Raises:
        ValueError: whatever the parts refuse.
    """
    task = Task(**spec["task"])
    device = device_named(task.device)
    tok = load_tokenizer(task.model)
    before = 0 if device.type == "cuda" else peak_memory(device)
    if spec["variant"] is None:
        model = _load(task, device, None, resident_dtype(device))
        return {"general": measures.perplexity_facts(measures.general(model, tok, task))}
    variant, folder = Variant(**spec["variant"]), Path(spec["folder"])
    method = METHODS[variant.method]
    # a whole model is trained in float32: small steps would round away in 16 bits
    whole = method.trains and method.build is None
    dtype = torch.float32 if whole else resident_dtype(device)
    model = _load(task, device, method.quantize, dtype)
    found: dict[str, Any] = {"parameters": parameter_counts(model)[1], "trainable": 0}
    if method.trains:
        found |= _train(model, tok, task, variant)
        found |= _memory(device, before)
        found["bytes"] = _save(model, task, folder, whole)
        after = measures.general(model, tok, task)
        found["forgetting"] = measures.forgotten(spec["base"]["general"], after)
    questions = asked_questions(task)
    shown = {"system": spec["system"], "shots": spec["shots"]}
    mark = spec["mark"]
    found |= measures.answered(model, tok, task, questions, folder, mark=mark, **shown)
    found |= measures.held_out_loss(model, tok, questions, **shown)
    if not method.trains:
        found |= _memory(device, before)
    prompt = tok.encode_prompt(prompt_of(questions[0], **shown))
    return found | _latency(model, prompt, task, method.trains and not whole)


def _load(task: Task, device: torch.device, code: str | None, dtype: torch.dtype) -> nn.Module:
    model = load_model(task.model, quantize=code, dtype=dtype, device=device)
    check_writes_text(model, task.model)
    return model.eval()


def _train(model: nn.Module, tok: Tokenizer, task: Task, variant: Variant) -> dict[str, Any]:
    """Attach what is trained, train it, and say how that went."""
    rows = SFTDataset.from_jsonl(
        task.data, tok, max_length=task.max_length, columns=task.columns, seed=variant.seed
    )
    torch.manual_seed(variant.seed)  # the adapter's start
    adapter = variant.adapter()
    if adapter is None:
        model.requires_grad_(True)
    else:
        add_adapter(model, adapter)
    settings, parent = variant.settings, os.getppid()

    def orphaned(_: object) -> None:
        if os.getppid() != parent:  # nobody waits for the figures any more
            raise KeyboardInterrupt

    config = TrainConfig(
        lr=settings["lr"],
        steps=settings["steps"],
        batch_size=settings["batch_size"],
        accumulate=1,
        seed=variant.seed,
        progress=False,
    )
    trainable, parameters = parameter_counts(model)
    result = train(model, rows, config, on_step=orphaned)
    if result.interrupted:
        raise KeyboardInterrupt
    model.eval()
    return {
        "trainable": trainable,
        "parameters": parameters,
        "train_seconds": sum(record["seconds"] for record in result.history),
        "tokens_per_second": result.tokens_per_second,
        "history": _curve(result),
    }


def _curve(result: TrainResult) -> list[dict[str, float]]:
    every = max(1, len(result.history) // _POINTS)
    kept: Sequence[dict[str, Any]] = result.history[::every]
    return [{"step": record["step"], "loss": record["loss"]} for record in kept]


def _memory(device: torch.device, before: int) -> dict[str, int]:
    peak = peak_memory(device)
    return {"memory": peak - before, "memory_whole": peak}


def _save(model: nn.Module, task: Task, folder: Path, whole: bool) -> int:
    """Save what was trained, and say how many bytes of weights that is."""
    if whole:
        save_model(model, folder / "model", source=task.model)
        return sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
    save_adapter(model, folder / "adapter", base_model=task.model)
    return (folder / "adapter" / "adapter_model.safetensors").stat().st_size


def _latency(model: nn.Module, prompt: Sequence[int], task: Task, attached: bool) -> dict[str, Any]:
    found = measure_latency(model, prompt, tokens=task.latency_tokens, rounds=task.latency_runs)
    reason = why_unmergeable(model) if attached else None
    return {
        "latency": {state: asdict(latency) for state, latency in found.items()},
        "mergeable": reason is None if attached else None,
        "unmergeable": reason,
    }


def reason_of(error: BaseException) -> str:
    """An error as one line for a table."""
    said = out_of_memory(error)
    if said is not None:
        return f"out of memory: {said}"
    lines = " ".join(str(error).split())
    plain = isinstance(error, ValueError | TypeError | OSError)
    return lines if plain and lines else f"{type(error).__name__}: {lines}"


def main(argv: Sequence[str]) -> int:
    """Read SPEC, write RESULT; 0 done, 1 failed, 130 interrupted."""
    spec_file, result_file = map(Path, argv)
    spec = json.loads(spec_file.read_text(encoding="utf-8"))
    began, code = time.perf_counter(), 0
    try:
        result = run(spec)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001  # whatever it is, the other variants go on
        traceback.print_exc()
        result, code = {"failed": reason_of(error)}, 1
    result["seconds"] = time.perf_counter() - began
    atomic_write(result_file, json.dumps(result, ensure_ascii=False) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
