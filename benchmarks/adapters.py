"""Every method side by side: parameters, time and memory of a training step, and error of merging.

    python -m benchmarks.adapters [--rank 16] [--repeats 7] [--only LoRA,DoRA] [--smoke]

The model is transformers' Llama with random weights, the same for this library and for PEFT, in
float32 and, for the rows marked NF4, with its linear layers in 4 bits (PEFT on bitsandbytes).
Before anything is timed an adapter with random weights is saved here and loaded by PEFT: the
logits have to be equal to rounding. A step is forward, backward and AdamW on 4 rows of 128 tokens;
memory is the most allocated at once in it, beyond the model. The merge's error is the largest
difference of the logits by merging, as a share of the largest logit.
"""

import argparse
import copy
import dataclasses
import functools
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lora_core as lc
from benchmarks.harness import (
    Timing,
    machine,
    peak_allocation,
    record,
    results_file,
    time_in_turns,
    version,
)
from benchmarks.methods import METHODS, Method, adapted, peer, shake

FOUR_BIT = ("LoRA", "DoRA")  # the methods that are also measured on a 4-bit base
ROUNDING = 1e-4  # of the largest logit: float32 through a few layers


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; times in seconds, memory in bytes, errors as shares."""

    method: str
    parameters: int
    ours: Timing
    theirs: Timing | None
    memory: int
    their_memory: int | None
    merge: float | None
    their_merge: float | None


def base_model(smoke: bool) -> nn.Module:
    """The model that everything is added to."""
    import transformers

    sizes = (64, 128, 2, 128) if smoke else (512, 1376, 4, 4096)
    hidden, inner, layers, words = sizes
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=words,
        use_cache=False,
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval().requires_grad_(False)


def in_bnb(model: nn.Module) -> nn.Module:
    """The model with bitsandbytes' 4-bit layers in place of all linear ones but the head."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            four = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=torch.float32,
                quant_type="nf4",
                compress_statistics=True,
            )
            four.weight = bnb.nn.Params4bit(
                layer.weight.data.clone(), requires_grad=False, quant_type="nf4"
            )
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, four.to("cpu"))
    return model.train()  # in evaluation bitsandbytes repacks weights on some CPUs


def logits(model: Any, ids: Tensor) -> Tensor:
    """Logits of the text without gradients; PEFT also returns those of virtual tokens."""
    with torch.no_grad():
        out: Tensor = model(input_ids=ids).logits
    return out[:, -ids.shape[1] :]


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def check_equal(method: Method, base: nn.Module, r: int, ids: Tensor) -> None:
    """Refuse to time what PEFT does not compute alike.

    Raises:
        AssertionError: says by how much the logits differ.
    """
    import peft

    ours = adapted(copy.deepcopy(base), method, r)
    with tempfile.TemporaryDirectory() as folder:
        lc.save_adapter(ours, folder)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    error = distance(logits(theirs, ids), logits(ours, ids))
    assert error <= ROUNDING, f"{method.name}: PEFT's logits differ by {error:.1e}"


def stepper(model: Any) -> Callable[[Tensor], None]:
    """One training step of a model with an adapter."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(ids: Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def merge_error(model: Any, ids: Tensor, merge: Callable[[], Any]) -> float | None:
    """Change of the logits by merging; None where the kind cannot be merged."""
    model.eval()
    before = logits(model, ids)
    try:
        merge()
    except (ValueError, AttributeError, RuntimeError):  # each library's way to refuse
        return None
    return distance(logits(model, ids), before)


def measure(
    method: Method, base: nn.Module, r: int, batches: Sequence[Tensor], repeats: int, bits: int
) -> Row:
    """Check, time and weigh one method and its peer."""
    if bits == 32:
        if method.peer is not None:
            check_equal(method, base, r, batches[0])
    else:
        method = dataclasses.replace(method, name=f"{method.name}, NF4")
    ours = copy.deepcopy(base)
    if bits == 4:
        lc.quantize_model(ours)
    ours = adapted(ours, method, r).train()
    on = in_bnb(copy.deepcopy(base)) if bits == 4 else copy.deepcopy(base)
    theirs = peer(on, method, r)
    if theirs is not None:
        shake(theirs)
    models = {"ours": ours} if theirs is None else {"ours": ours, "theirs": theirs.train()}
    steps = {name: stepper(model) for name, model in models.items()}
    times = time_in_turns(steps, dict.fromkeys(steps, batches), repeats)
    memory = {
        name: peak_allocation(functools.partial(step, batches[0])) for name, step in steps.items()
    }
    errors = {"ours": merge_error(ours, batches[0], functools.partial(lc.merge_adapters, ours))}
    if theirs is not None and bits == 32:
        tuner: Any = theirs.base_model
        errors["theirs"] = merge_error(theirs, batches[0], lambda: tuner.merge_adapter())  # noqa: PLW0108  # may not be there
    return Row(
        method.name,
        lc.adapters.parameter_counts(ours)[0] if bits == 32 else _trainable(ours),
        times["ours"],
        times.get("theirs"),
        memory["ours"],
        memory.get("theirs"),
        errors["ours"],
        errors.get("theirs"),
    )


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def told(row: Row) -> str:
    """A row as text: figures here, then the peer's and the ratio."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    text = f"{row.method:<24} {row.parameters:>10,}  {row.ours.median * 1e3:8.1f} ms"
    text += f"  {row.memory / 1e6:8.1f} MB  {share(row.merge):>8}"
    if row.theirs is None or row.their_memory is None:
        return text
    text += f"  | {row.theirs.median * 1e3:8.1f} ms  {row.their_memory / 1e6:8.1f} MB"
    text += f"  {share(row.their_merge):>8}"
    faster, smaller = row.theirs.median / row.ours.median, row.their_memory / row.memory
    return f"{text}  | {faster:5.2f}x time  {smaller:5.2f}x memory"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and append its rows to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", help="methods, by the start of their names, with commas")
    parser.add_argument("--smoke", action="store_true", help="a toy model; figures mean nothing")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    facts = {**machine(), "lora-core": lc.__version__, "peft": version("peft")}
    facts["bitsandbytes"] = version("bitsandbytes")
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    base = base_model(args.smoke)
    size = (2, 16) if args.smoke else (4, 128)
    words = int(base.config.vocab_size)  # type: ignore[union-attr, arg-type]
    batches = [torch.randint(0, words, size) for _ in range(4)]
    wanted = tuple(args.only.split(",")) if args.only else ("",)
    print(f"{'method':<24} {'parameters':>10}  {'step':>11}  {'memory':>11}  {'merge':>8}  | PEFT")
    rows = []
    for method in METHODS:
        for bits in (32, 4) if method.name in FOUR_BIT else (32,):
            if not method.name.startswith(wanted):
                continue
            rows.append(measure(method, base, args.rank, batches, args.repeats, bits))
            print(told(rows[-1]), flush=True)
    if not args.smoke:
        found = [{"benchmark": "adapters", **dataclasses.asdict(row), **facts} for row in rows]
        record(results_file(), found)
        print(json.dumps({"rows": len(found), "written": str(results_file().name)}))


if __name__ == "__main__":
    main()
