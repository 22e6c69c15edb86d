"""How many tokens a second does generation make, and in how much memory, beside transformers'?

    python -m benchmarks.generation                          # random weights, and the shipped base
    python -m benchmarks.generation --hidden 2048 --layers 16 --tokens 128
    python -m benchmarks.generation --smoke                  # tiny, in one process: no figures

Two folders: random weights of a Llama's shape, written to a temporary place, and the base model
that ships with the package. Each is run dense and in NF4 (both stacks read one folder of 4-bit
codes in bitsandbytes' format, so that they hold the same weights), without an adapter, with a LoRA
adapter beside the weights, and merged; transformers through PEFT. Batches of equal prompts' lengths
are continued greedily to a fixed length, with no token that ends a row.

Prefill is the time to the first new token; decoding is what the others take:

    prefill  B T / t(1 token)          decode  B (N - 1) / (t(N tokens) - t(1 token))

Each stack runs in a process of its own. Memory is the most that was resident in it, imports and
weights included (on a GPU the most that its allocator held), and how much of that came while it
generated.

Results first: this library must write the tokens that transformers writes, or nothing is reported;
in NF4, those that transformers writes on the same 4-bit weights made dense. bitsandbytes' own may
part from them, since on CPUs with AVX512_BF16 it multiplies in bfloat16 whatever it is asked for:
the last column says which share of the tokens it has in common with the dense run.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Timing, machine, record, results_file, version
from lora_core import base_model_path, dequantize_model
from lora_core.adapters import LoRAConfig, adapted_modules, add_adapter, merge_adapters
from lora_core.checkpoint import load_adapter, load_model, save_adapter, save_model
from lora_core.device import default_device, peak_memory, synchronize
from lora_core.models import CausalLM, ModelConfig, generate_ids

ROOT = Path(__file__).parents[1]
ADAPTERS = ("none", "lora", "merged")
Tokens = Sequence[Sequence[int]]
Generate = Callable[[Tensor, int], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is run, by either stack."""

    name: str
    """of the weights"""
    weights: str
    """"dense" or "nf4\""""
    folder: str
    """of the model: dense, or 4-bit in bitsandbytes' format"""
    equal: str
    """of a dense model with the same weights"""
    adapter: str
    """"none", "lora" or "merged\""""
    adapter_folder: str
    """of the LoRA adapter, in PEFT's format"""
    dtype: str
    """of the dense weights in memory, and of the computation"""
    batches: tuple[int, ...]
    """rows"""
    prompt: int
    """tokens of a prompt"""
    tokens: int
    """new tokens"""
    repeat: int
    """timed runs"""


def ours(case: Case) -> Generate:
    """This library: a function of prompts (B, T) and N that gives new tokens (B, N)."""
    dtype = getattr(torch, case.dtype)
    model = load_model(case.folder, dtype=dtype, device=default_device())
    if case.adapter != "none":
        load_adapter(model, case.adapter_folder)
    if case.adapter == "merged":
        merge_adapters(model, keep_base=False)
    return lambda ids, count: torch.tensor(generate_ids(model.eval(), ids, max_new_tokens=count))


def theirs(case: Case) -> Generate:
    """transformers, with bitsandbytes' layers where the folder is in 4 bits, and PEFT."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    device = default_device()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        case.folder, dtype=getattr(torch, case.dtype), device_map=str(device)
    )
    if case.adapter != "none":
        import peft

        model = peft.PeftModel.from_pretrained(model, case.adapter_folder)
    if case.adapter == "merged":
        model = model.merge_and_unload()
    model.eval()
    model.generation_config.eos_token_id = None

    @torch.no_grad()
    def run(ids: Tensor, count: int) -> Tensor:
        found: Tensor = model.generate(
            input_ids=ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return found[:, ids.shape[1] :].cpu()

    return run


STACKS: dict[str, Callable[[Case], Generate]] = {"transformers": theirs, "lora_core": ours}


def resident() -> int:
    """Bytes in use now: of the GPU's allocator, else of this process."""
    if default_device().type == "cuda":
        return torch.cuda.memory_allocated()
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(stack: str, case: Case) -> dict[str, Any]:
    """Run a case: tokens, seconds and memory of each batch."""
    run = STACKS[stack](case)
    config = json.loads((Path(case.folder) / "config.json").read_text())
    found: dict[str, Any] = {}
    for batch in case.batches:
        generator = torch.Generator().manual_seed(batch)
        size = (batch, case.prompt)
        ids = torch.randint(3, config["vocab_size"], size, generator=generator)
        before = resident()
        tokens = run(ids, case.tokens)
        found[str(batch)] = {
            "tokens": tokens.tolist(),
            "prefill": _seconds(run, ids, 1, case.repeat),
            "all": _seconds(run, ids, case.tokens, case.repeat),
            "peak_bytes": (peak := peak_memory(default_device())),
            "above_bytes": max(peak - before, 0),
        }
    return found


def _seconds(run: Generate, ids: Tensor, count: int, repeat: int) -> list[float]:
    times = []
    for _ in range(repeat):
        synchronize(default_device())
        begin = time.perf_counter()
        run(ids, count)
        synchronize(default_device())
        times.append(time.perf_counter() - begin)
    return times


def in_a_process(stack: str, case: Case) -> dict[str, Any]:
    """Measure in a process of its own.

    Raises:
        RuntimeError: it failed, with what it said last.
    """
    text = json.dumps(dataclasses.asdict(case))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.generation", "--child", stack, text],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"{stack} ended with {done.returncode}: {said}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def first_difference(some: Tokens, others: Tokens) -> str | None:
    """Where two stacks' tokens part, in words; None: nowhere."""
    for row, (one, other) in enumerate(zip(some, others, strict=True)):
        for at, (left, right) in enumerate(zip(one, other, strict=True)):
            if left != right:
                return f"row {row}, token {at}: {left} and {right}"
    return None


def in_common(some: Tokens, others: Tokens) -> float:
    """Share of the tokens before two stacks' rows part."""
    same = [
        next(
            (i for i, pair in enumerate(zip(*rows, strict=True)) if len({*pair}) > 1), len(rows[0])
        )
        for rows in zip(some, others, strict=True)
    ]
    return sum(same) / sum(map(len, some))


def write_folder(folder: Path, args: argparse.Namespace) -> None:
    """A model of random weights in a Llama's shape."""
    config = ModelConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 7 // 2 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 64, 1),
        num_key_value_heads=max(args.hidden // 256, 1),
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = CausalLM(config)
    # wide enough for an answer that changes with the text
    model.init_weights(2 * args.hidden**-0.5, torch.Generator().manual_seed(0))
    save_model(model, folder)


def cases(name: str, folder: Path, room: Path, args: argparse.Namespace) -> list[Case]:
    """All cases of a dense folder; its 4-bit copy and its adapter are written beside."""
    dtype = getattr(torch, args.dtype)
    model = load_model(folder, dtype=dtype, quantize="nf4")
    save_model(model, room / "nf4", quantized=True)
    dequantize_model(model)
    save_model(model, room / "equal")
    add_adapter(model, LoRAConfig(r=16, alpha=32))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, host in adapted_modules(model):
            for parameter in host.adapters.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.5 * parameter.shape[1] ** -0.5)
    save_adapter(model, room / "adapter")
    fixed = (tuple(args.batch), args.prompt, args.tokens, args.repeat)
    found = []
    for weights, where, equal in (("dense", folder, folder), ("nf4", room / "nf4", room / "equal")):
        for adapter in ADAPTERS:
            if (weights, adapter) == ("nf4", "merged"):
                continue  # PEFT merges into the 4 bits again: other weights
            paths = (str(where), str(equal), adapter, str(room / "adapter"))
            found.append(Case(name, weights, *paths, args.dtype, *fixed))
    return found


def compare(case: Case, run: Callable[[str, Case], dict[str, Any]]) -> list[dict[str, Any]]:
    """Run a case in both stacks; a row of results for each batch and stack."""
    what = f"{case.name:8} {case.weights:6} {case.adapter:7}"
    results: dict[str, dict[str, Any]] = {}
    for stack in STACKS:
        try:
            results[stack] = run(stack, case)
        except (RuntimeError, ValueError, ImportError) as error:
            print(f"{what} {stack}: not timed: {error}")
    if "lora_core" not in results:
        return []
    truth = results.get("transformers")
    if truth is None or case.equal != case.folder:
        truth = run("transformers", dataclasses.replace(case, folder=case.equal, repeat=0))
    rows = []
    for batch in map(str, case.batches):
        wanted = truth[batch]["tokens"]
        parted = first_difference(results["lora_core"][batch]["tokens"], wanted)
        if parted is not None:
            print(f"{what} batch {batch}: not reported: {parted}")
            continue
        for stack, result in results.items():
            share = in_common(result[batch]["tokens"], wanted)
            rows.append(summary(case, stack, int(batch), result[batch], share))
            print(f"{what} {line(rows[-1])}")
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    speeds = f"{row['prefill_tokens_per_second']:10.0f} {row['decode_tokens_per_second']:10.1f}"
    memory = f"{row['peak_bytes'] / 1e6:8.0f} {row['above_bytes'] / 1e6:7.0f}"
    return f"{row['batch']:3} {row['stack']:12} {speeds} {memory} {row['in_common']:7.0%}"


def summary(
    case: Case, stack: str, batch: int, result: dict[str, Any], share: float
) -> dict[str, Any]:
    """A line of the results file."""
    prefill, whole = Timing.of(result["prefill"]), Timing.of(result["all"])
    decode = max(whole.median - prefill.median, 1e-9)
    shape = json.loads((Path(case.folder) / "config.json").read_text())
    keys = ("hidden_size", "num_hidden_layers", "vocab_size")
    return {
        "benchmark": "generation",
        **machine(),
        "transformers": version("transformers"),
        **{key: shape[key] for key in keys},
        **{key: getattr(case, key) for key in ("name", "weights", "adapter", "dtype")},
        "stack": stack,
        "batch": batch,
        "prompt": case.prompt,
        "tokens": case.tokens,
        "prefill_seconds": [prefill.low, prefill.median, prefill.high],
        "seconds": [whole.low, whole.median, whole.high],
        "prefill_tokens_per_second": batch * case.prompt / prefill.median,
        "decode_tokens_per_second": batch * (case.tokens - 1) / decode,
        "peak_bytes": result["peak_bytes"],
        "above_bytes": result["above_bytes"],
        "in_common": share,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024, help="width (default 1024)")
    parser.add_argument("--layers", type=int, default=12, help="layers (default 12)")
    parser.add_argument("--vocab", type=int, default=32000, help="vocabulary (default 32000)")
    parser.add_argument("--dtype", default="float32", help="of weights and sums (default float32)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="rows (default 1 8)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (default 128)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens (default 64)")
    parser.add_argument("--repeat", type=int, default=5, help="timed runs (default 5)")
    parser.add_argument("--only", default="", help="cases with this text, as nf4 or lora")
    parser.add_argument("--smoke", action="store_true", help="tiny, in one process, no record")
    parser.add_argument("--out", type=Path, default=results_file(), help="JSON lines go here")
    parser.add_argument("--child", nargs=2, metavar="X", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tokens < 2:
        parser.error("--tokens must be at least 2: the first is prefill's")
    if args.smoke:
        args.hidden, args.layers, args.vocab, args.prompt, args.tokens = 64, 2, 256, 8, 6
        args.batch, args.repeat = [1, 2], 1
    return args


def main() -> int:
    """Write, run, compare, print; 1 if a case could not be reported."""
    args = arguments()
    if args.child:
        stack, text = args.child
        given = json.loads(text)
        print(json.dumps(measure(stack, Case(**given | {"batches": tuple(given["batches"])}))))
        return 0
    print(
        f"{'weights':23} {'B':>3} {'stack':12} {'prefill/s':>10} {'decode/s':>10} "
        f"{'peak MB':>8} {'above':>7} {'tokens':>7}"
    )
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        write_folder(room / "model", args)
        todo = cases("random", room / "model", room / "random", args)
        if not args.smoke:
            todo += cases("shipped", base_model_path(), room / "shipped", args)
        todo = [c for c in todo if args.only in f"{c.name} {c.weights} {c.adapter}"]
        whole = True
        for case in todo:
            rows = compare(case, measure if args.smoke else in_a_process)
            whole &= len(rows) == 2 * len(case.batches)
            if not args.smoke:
                record(args.out, rows)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
