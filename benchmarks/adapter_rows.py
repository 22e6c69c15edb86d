"""How does the latency of a batch grow with the number of adapters that its rows name?

    python -m benchmarks.adapter_rows [--adapters 1 8 32] [--repeats 15] [--four-bit] [--smoke]

A batch of 32 rows through transformers' Llama (12 layers) with random weights, under 1 to 32 LoRA
adapters of all linear layers in turn, by `adapter_rows` and by PEFT's `adapter_names`, in the same
process on the same base weights and the same adapters, which were saved here and loaded by PEFT.
"one" is the model with one adapter active for all rows, no rows named; "rows" enters the context
and runs one forward, "inside" is a forward of eight in one context. A training step is forward
and backward into all adapters that the rows name; PEFT refuses to train such a batch.

Correctness comes first: every row's logits have to be what that adapter gives alone, in float64 the
truth, in float32 within twice the error of the row by itself plus two roundings; and PEFT's within
the same bound. The ratios are to "one"; the aim is at most 2 with 32 adapters.
"""

import argparse
import copy
import functools
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import (
    Timing,
    machine,
    record,
    results_file,
    time_in_turns,
    version,
)
from lora_core import LoRAConfig, adapter_rows, add_adapter, save_adapter, set_adapters
from lora_core.adapters import adapted_modules
from lora_core.quant import quantize_model

BATCH = 32
FORWARDS = 8  # in one context
Names = list[str | None]


def base_model(hidden: int, layers: int) -> nn.Module:
    """The model that everything is added to."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def with_adapters(model: nn.Module, count: int, rank: int) -> list[str]:
    """Add LoRA adapters with random weights, trainable all of them; returns their names."""
    names = [f"a{i}" for i in range(count)]
    for name in names:
        add_adapter(model, LoRAConfig(r=rank), name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, host in adapted_modules(model):
            for p in host.adapters.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    set_adapters(model, names, trainable=True)
    set_adapters(model, names[0])
    return names


def in_peft(model: nn.Module, names: list[str], base: nn.Module) -> nn.Module:
    """The same adapters on a copy of the base, in PEFT."""
    import peft

    copied = copy.deepcopy(base)
    wrapped: Any = None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            save_adapter(model, Path(folder) / name, name)
            where = str(Path(folder) / name)
            if wrapped is None:
                wrapped = peft.PeftModel.from_pretrained(copied, where, adapter_name=name)
            else:
                wrapped.load_adapter(where, name)
    wrapped.set_adapter(names[0])
    return wrapped.eval()


def turns(names: list[str], count: int, rows: int) -> Names:
    """`count` adapters, row by row in turn."""
    return [names[i % count] for i in range(rows)]


def check(model: nn.Module, peer: Any, names: Names, ids: Tensor) -> None:
    """Refuse to time a wrong answer."""
    with torch.no_grad(), adapter_rows(model, names):
        mixed = model(input_ids=ids).logits
    alone, truth, double = [], [], copy.deepcopy(model).double()
    for row, name in enumerate(names):
        for net, found in ((model, alone), (double, truth)):
            set_adapters(net, [] if name is None else name)
            with torch.no_grad():
                found.append(net(input_ids=ids[row : row + 1]).logits)
    wanted, single = torch.cat(truth), torch.cat(alone)
    eps = torch.finfo(torch.float32).eps
    error = (single.double() - wanted).abs().max().item()
    allowed = 2 * error + 2 * eps * wanted.abs().max().item()
    answers = {"adapter_rows": mixed}
    if peer is not None:
        with torch.no_grad():
            answers["PEFT"] = peer(input_ids=ids, adapter_names=names).logits
    for who, logits in answers.items():
        off = (logits.double() - wanted).abs().max().item()
        if not off <= allowed:
            raise ValueError(f"{who} is off by {off:.2e}, allowed {allowed:.2e}: not timed")


def step(model: nn.Module, names: Names | None, ids: Tensor) -> None:
    """Forward and backward into the adapters."""
    with nullcontext() if names is None else adapter_rows(model, names):
        model(input_ids=ids, labels=ids).loss.backward()
    for p in model.parameters():
        p.grad = None


def runs(
    model: nn.Module, peer: Any, names: list[str], counts: list[int], training: bool
) -> dict[str, Callable[[Tensor], object]]:
    """What is timed, by name; each takes token ids (B, T)."""

    def one(ids: Tensor) -> object:
        return step(model, None, ids) if training else model(input_ids=ids)

    found: dict[str, Callable[[Tensor], object]] = {"one": one}
    for count in counts:
        rows = turns(names, count, BATCH)
        found[f"rows {count}"] = functools.partial(_mixed, model, rows, training)
        if not training:
            found[f"inside {count}"] = functools.partial(_inside, model, rows)
            if peer is not None:
                found[f"PEFT {count}"] = functools.partial(_theirs, peer, rows)
    if not training and peer is not None:
        found["PEFT one"] = lambda ids: peer(input_ids=ids)
    return found


def _mixed(model: nn.Module, rows: Names, training: bool, ids: Tensor) -> None:
    if training:
        return step(model, rows, ids)
    with adapter_rows(model, rows):
        model(input_ids=ids)
    return None


def _inside(model: nn.Module, rows: Names, ids: Tensor) -> None:
    """Forwards of one context, as in generation."""
    with adapter_rows(model, rows):
        for _ in range(FORWARDS):
            model(input_ids=ids)


def _theirs(peer: Any, rows: Names, ids: Tensor) -> None:
    peer(input_ids=ids, adapter_names=rows)


def measure(
    model: nn.Module, peer: Any, names: list[str], args: argparse.Namespace, training: bool
) -> dict[str, Timing]:
    """Median and quantiles of every way, in turns."""
    ids = [torch.randint(512, (BATCH, args.tokens)) for _ in range(4)]
    ways = runs(model, peer, names, args.adapters, training)
    with torch.set_grad_enabled(training):
        timings = time_in_turns(ways, dict.fromkeys(ways, ids), args.repeats)
    return {
        name: Timing(t.median / FORWARDS, t.low / FORWARDS, t.high / FORWARDS)
        if name.startswith("inside")
        else t
        for name, t in timings.items()
    }


def main() -> None:
    """Check, time, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rank", type=int, default=8, help="of every adapter (default 8)")
    parser.add_argument("--hidden", type=int, default=64, help="width (default 64)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens a row (default 16)")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls (default 15)")
    parser.add_argument("--threads", type=int, help="threads of the process")
    parser.add_argument("--four-bit", action="store_true", help="a base in NF4, without PEFT")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, nothing is recorded")
    args = parser.parse_args()
    if args.smoke:
        args.repeats, args.adapters = 1, [1, 4]
    if args.threads:
        torch.set_num_threads(args.threads)
    base = base_model(args.hidden, 2 if args.smoke else 12)
    if args.four_bit:
        quantize_model(base)
    model = copy.deepcopy(base)
    names = with_adapters(model, max(args.adapters), args.rank)
    peer = None if args.four_bit else in_peft(model, names, base)
    described = machine() | {"peft": version("peft"), "transformers": version("transformers")}
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    shape = {
        "batch": BATCH,
        "hidden": args.hidden,
        "tokens": args.tokens,
        "rank": args.rank,
        "four_bit": args.four_bit,
    }
    print(", ".join(f"{key} {value}" for key, value in shape.items()))
    for count in args.adapters:
        ids = torch.randint(512, (BATCH, args.tokens))
        check(model, peer, turns(names, count, BATCH), ids)
    set_adapters(model, names[0])
    lines = []
    for training in (False, True):
        timings = measure(model, peer, names, args, training)
        what, unit = ("training step" if training else "forward"), timings["one"].median
        print(f"\n{what:16} {'median [20 %, 80 %]':>34} {'to one':>7}")
        for name, timing in timings.items():
            print(f"{name:16} {timing!s:>34} {timing.median / unit:7.2f}")
            line = {"benchmark": "adapter_rows", "what": what, "way": name, **shape, **described}
            lines.append(line | {"seconds": [timing.low, timing.median, timing.high]})
    if not args.smoke:
        record(results_file(), lines)


if __name__ == "__main__":
    main()
