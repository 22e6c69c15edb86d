"""What is left of an update after merging it, and of its effect on outputs.

    python -m benchmarks.merging            # the shipped base model, and made-up inputs; minutes
    python -m benchmarks.merging --smoke    # one size, one layer's width; seconds

First the shipped base model in NF4 with double quantization: a LoRA is trained on the quickstart's
questions and then scaled at every layer to a share of ‖W‖. It is merged in every way there is, and
measured on sequences that took no part in choosing codes (a quarter of the samples):

    kept          <stored - W, D> / <D, D>                  D the update, W the dequantized weight
    output error  |X (stored - W - D)ᵀ| / |X Dᵀ|            0 is exact, 1 as far as without D
    model         |merged - adapted| / |adapted - base|     of the logits

Then one made-up layer: inputs whose variances fall as i^-a in random directions, and an update that
is random, or among the inputs as a gradient is. It shows what the output error depends on.

Nothing is timed. Numbers are the same in every run up to rounding.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from lora_core import LoRAConfig, SFTDataset, TrainConfig, add_adapter, train
from lora_core.adapters import (
    LoRALinear,
    MergeReport,
    adapted_modules,
    dense_weight,
    merge_adapters,
    unmerge_adapters,
)
from lora_core.adapters.merge_report import compared
from lora_core.adapters.merge_samples import Moments, gather, model_output_error
from lora_core.checkpoint import base_model_path, load_model
from lora_core.data import load_tokenizer
from lora_core.data.stdlib import function_conversations, write_rows
from lora_core.evaluate import perplexity
from lora_core.quant import quantize_4bit
from lora_core.quant.compensate import output_cost, requantize_4bit

SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)
AIM = 0.3
WIDTH, SEQUENCES, BATCH = 256, 32, 8  # tokens a sequence; sequences; sequences a batch
Row = dict[str, Any]


def trained_model(steps: int) -> tuple[nn.Module, list[Tensor], SFTDataset]:
    """The shipped model in NF4 with a LoRA trained on it, samples, and held-out questions."""
    torch.manual_seed(0)
    base = base_model_path()
    tok = load_tokenizer(base)
    model = load_model(base, quantize="nf4", dtype=torch.float32)
    add_adapter(model, LoRAConfig(r=16, alpha=32))
    rows = function_conversations(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("train.jsonl", "held-out.jsonl")]
        write_rows(files[0], rows[64:])
        write_rows(files[1], rows[:64])
        data, held = (SFTDataset.from_jsonl(file, tok, max_length=WIDTH) for file in files)
    train(
        model,
        data,
        TrainConfig(lr=4e-3, steps=steps, batch_size=8, accumulate=1, seed=0, progress=False),
    )
    ids: list[int] = []
    for i in range(len(data)):
        ids += data[i]["input_ids"]
        if len(ids) >= SEQUENCES * WIDTH:
            break
    samples = torch.tensor(ids[: SEQUENCES * WIDTH]).view(-1, BATCH, WIDTH)
    return model.eval(), list(samples), held


def hosts_of(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The layers with a LoRA."""
    for name, host in adapted_modules(model):
        assert isinstance(host, LoRALinear)
        yield name, host


def size_of(host: LoRALinear) -> float:
    """|D| / |W|."""
    return float(host.delta_weight().detach().norm() / dense_weight(host.base).norm())


@torch.no_grad()
def rescale(model: nn.Module, share: float) -> None:
    """Give every layer's update that share of its weight's norm."""
    for _, host in hosts_of(model):
        host.B.mul_(share / size_of(host))


def summary(target: str, report: MergeReport) -> Row:
    """One row of the table."""
    errors = [layer.output_error for layer in report.layers if layer.output_error is not None]
    return {
        "target": target,
        "kept": statistics.median(layer.kept for layer in report.layers),
        "median": statistics.median(errors),
        "best": min(errors),
        "worst": max(errors),
        "within_aim": sum(error <= AIM for error in errors),
        "layers": len(errors),
        "model": report.output_error,
    }


def merged_every_way(model: nn.Module, samples: list[Tensor]) -> Iterator[Row]:
    """Merge in each of the ways that stay with the dequantized weight; unmerged after each."""
    ways: dict[str, dict[str, Any]] = {
        "float16 copy": {"dtype": torch.float16},
        "bfloat16 copy": {"dtype": torch.bfloat16},
        "4 bits, plain": {"requantize": True, "method": "plain"},
        "4 bits, compensated": {"requantize": True},
    }
    for target, options in ways.items():
        report = merge_adapters(model, samples=samples, **options)
        yield summary(target, report)
        unmerge_adapters(model)


@torch.no_grad()
def onto_originals(model: nn.Module, samples: list[Tensor]) -> Row:
    """The same updates on the weights from before quantization, against the trained model."""
    originals = dict(load_model(base_model_path(), dtype=torch.float32).named_modules())
    moments = gather(model, [host for _, host in hosts_of(model)], samples)
    plan, kept, errors = [], [], []
    for name, host in hosts_of(model):
        old, update = dense_weight(host.base), host.delta_weight()
        stored = dense_weight(originals[name]) + update
        module = nn.Linear(*reversed(old.shape), bias=False)
        module.weight = nn.Parameter(stored, requires_grad=False)
        plan.append((host, tuple(host.active), module))
        kept.append(compared([stored - old], [update])[0])
        errors.append(output_error(stored, old + update, old, moments[id(host)]))
    return {
        "target": "onto the originals",
        "kept": statistics.median(kept),
        "median": statistics.median(errors),
        "best": min(errors),
        "worst": max(errors),
        "within_aim": sum(error <= AIM for error in errors),
        "layers": len(errors),
        "model": model_output_error(model, plan, list(samples)),
    }


def output_error(stored: Tensor, wanted: Tensor, old: Tensor, moments: Moments) -> float:
    """|X (stored - wanted)ᵀ| / |X (wanted - old)ᵀ| on held-out rows."""
    miss = output_cost(stored.double() - wanted, moments.held_out).sum()
    return float((miss / output_cost(wanted.double() - old, moments.held_out).sum()).sqrt())


def real_model(shares: tuple[float, ...], steps: int) -> list[Row]:
    """The first table, and how well the trained model does after each merge."""
    model, samples, held = trained_model(steps)
    sizes = [size_of(host) for _, host in hosts_of(model)]
    rows: list[Row] = []
    print(f"as trained, {steps} steps: updates of {min(sizes):.0%} to {max(sizes):.0%} of |W|")
    rows += judged(model, samples, held)
    heading = f"{'|D|/|W|':>8} {'merged into':<20} {'kept':>7} {'output error':>13} {'best':>7}"
    print(f"\n{heading} {'worst':>7} {f'<= {AIM}':>7} {'model':>7}")
    for share in shares:
        rescale(model, share)
        for row in (*merged_every_way(model, samples), onto_originals(model, samples)):
            rows.append({"share": share} | row)
            print(f"{share:8.1%} {line(row)}", flush=True)
    return rows


def judged(model: nn.Module, samples: list[Tensor], held: SFTDataset) -> Iterator[Row]:
    """Perplexity of the held-out answers, as trained and after each merge."""
    print(f"{'':8} {'':20} held-out perplexity {perplexity(model, held).perplexity:.3f}")
    for row in merged_every_way(model, samples):  # merged while the loop is here
        row["perplexity"] = perplexity(model, held).perplexity
        print(f"{'':8} {line(row)}  perplexity {row['perplexity']:.3f}", flush=True)
        yield {"share": None} | row


def line(row: Row) -> str:
    """A row as text."""
    return (
        f"{row['target']:<20} {row['kept']:7.1%} {row['median']:13.3f} {row['best']:7.3f} "
        f"{row['worst']:7.3f} {row['within_aim']:>3}/{row['layers']:<3} {row['model']:7.3f}"
    )


def made_up(width: int, exponents: tuple[float, ...], shares: tuple[float, ...]) -> list[Row]:
    """The second table: what the output error depends on."""
    rows: list[Row] = []
    print(f"\none layer of width {width}, {8 * width} rows of inputs; output error (plain's)")
    titles = [f"{kind}, {share:.0%}" for kind in ("random", "among inputs") for share in shares]
    print(f"{'a':>5} " + " ".join(f"{title:>20}" for title in titles))
    for exponent in exponents:
        cells = []
        for kind in ("random", "among inputs"):
            for share in shares:
                ours, plain = one_layer(width, exponent, kind, share)
                rows.append(
                    {"width": width, "exponent": exponent, "update": kind, "share": share}
                    | {"compensated": ours, "plain": plain}
                )
                cells.append(f"{f'{ours:.3f} ({plain:.3f})':>20}")
        print(f"{exponent:5.1f} " + " ".join(cells), flush=True)
    return rows


def one_layer(
    width: int, exponent: float, kind: str, share: float, rows: int = 8, beams: int = 8
) -> tuple[float, float]:
    """Output errors of compensated and of plain requantization, on the inputs' true moment.

    Args:
        width: K.
        exponent: a.
        kind: "random" or "among inputs".
        share: |D| / |W|.
        rows: of sample inputs, as a multiple of the width (below 1: 1 / -rows).
        beams: of the search.
    """
    g = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=g))[0]
    shape = rotation * torch.arange(1, width + 1) ** (-exponent / 2)  # (K, K)
    start = quantize_4bit(torch.randn(64, width, generator=g))
    weight = start.dequantize()
    down = torch.randn(16, width, generator=g)
    down = down @ shape.t() if kind == "among inputs" else down
    update = torch.randn(64, 16, generator=g) @ down
    update *= share * weight.norm() / update.norm()
    count = width * rows if rows > 0 else width // -rows
    x = torch.randn(count, width, generator=g) @ shape.t()
    true = shape.double() @ shape.double().t()
    moments = Moments(x.double().t() @ x.double(), true)
    wanted = weight + update
    made = (
        requantize_4bit(start, wanted, moments.chosen_on, beams=beams),
        quantize_4bit(wanted),
    )
    errors = [output_error(one.dequantize(), wanted, weight, moments) for one in made]
    return errors[0], errors[1]


def what_helps(width: int) -> list[Row]:
    """The third table: more search, and fewer samples."""
    fixed = {"width": width, "exponent": 1.0, "kind": "among inputs", "share": 0.01}
    print(f"\nwidth {width}, a = 1, among inputs, 1%; output error")
    rows: list[Row] = []
    for option, values in {"beams": (1, 8, 64, 256), "rows": (-4, -2, 1, 2, 8, 32)}.items():
        found = {v: one_layer(**fixed, **{option: v})[0] for v in values}  # type: ignore[arg-type]
        rows += [fixed | {option: v, "compensated": error} for v, error in found.items()]
        told = (f"{v if v > 0 else f'1/{-v}'}: {error:.3f}" for v, error in found.items())
        unit = "" if option == "beams" else f" of samples, in multiples of {width}"
        print(f"{option}{unit}   " + "   ".join(told), flush=True)
    return rows


def main() -> None:
    """Print both tables and append them to the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="one size, one width: seconds")
    parser.add_argument("--steps", type=int, default=60, help="of training [60]")
    args = parser.parse_args()
    shares = (0.02,) if args.smoke else SHARES
    rows = real_model(shares, 2 if args.smoke else args.steps)
    exponents = (1.5,) if args.smoke else (0.0, 0.5, 1.0, 1.5, 2.0)
    for width in (64,) if args.smoke else (256, 1024):
        rows += made_up(width, exponents, (0.01, 0.02) if width < 1024 else (0.01,))
    rows += what_helps(64 if args.smoke else 256)
    if not args.smoke:
        about = {"benchmark": "merging"} | harness.machine()
        harness.record(harness.results_file(), [about | row for row in rows])


if __name__ == "__main__":
    main()
