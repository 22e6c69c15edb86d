"""`lora-core merge`: fold an adapter into its base and write a folder that transformers loads.

For an adapter trained on a 4-bit base the merge is made on the dequantized weights, the ones it was
trained against; folding it into the 16-bit originals instead adds back the quantization error that
the adapter had learned to live with. `--onto-original` does that all the same, and prints how far
the result is from the trained model. Either way the folder is loaded again and its logits compared.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapters import MergeReport, merge_adapters, unload_adapters
from lora_core.checkpoint import load_model, save_model
from lora_core.models import read_config
from lora_core.quant import NF4Linear
from lora_core.runs.opening import Opened, open_model

HELP = "fold an adapter into its base and write a Hugging Face folder"
EXAMPLE = "lora-core merge --adapter runs/mine --out runs/mine-merged"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PROBE = "The quick brown fox jumps over the lazy dog. 0123456789 def f(x): return x + 1\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--adapter", metavar="DIR", required=True, help="adapter folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write; must be new")
    parser.add_argument("--model", metavar="DIR", help="base folder [the one the adapter names]")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="dtype of the weights written [the base's own]"
    )
    parser.add_argument(
        "--onto-original",
        action="store_true",
        help="merge onto the 16-bit weights although the adapter was trained on 4-bit ones",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … [the accelerator, else cpu]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def own_dtype(folder: str | Path) -> str:
    """The dtype that a folder's config.json names."""
    return read_config(folder).dtype or "float32"


@torch.no_grad()
def probe_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """Logits (1, T, V) in float32 for a fixed text."""
    device = next(model.parameters()).device
    return model(torch.tensor([ids], device=device)).logits.float().cpu()


def merged_folder(opened: Opened, out: str | Path, dtype: torch.dtype | None = None) -> MergeReport:
    """Merge the active adapters of an opened model for good and write the model's folder.

    Args:
        opened: model with adapters; its modules are replaced by plain, dense ones.
        out: a new folder.
        dtype: of the weights on disk; None: the base's own.

    Returns:
        What merging did.
    """
    # float32 throughout: the one rounding is the one to the dtype on disk
    report = merge_adapters(opened.model, dtype=torch.float32, keep_base=False)
    unload_adapters(opened.model)
    # what is still 4-bit is written dense, layer by layer
    save_model(opened.model, out, source=opened.source, dtype=dtype or own_dtype(opened.source))
    opened.tok.save(out)
    return report


def run(args: argparse.Namespace) -> int:
    """Merge, write, load again, compare."""
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: choose a new folder for the merged model")
    trained = open_model(args.model, args.adapter, device=args.device)
    ids = trained.tok.encode(_PROBE)
    wanted = probe_logits(trained.model, ids)
    merging, notes = trained, list(trained.notes)
    # LoftQ quantizes a base that was loaded dense
    quantized = (m.code for m in trained.model.modules() if isinstance(m, NF4Linear))
    code = trained.quantize or next(quantized, None)
    if args.onto_original and code != trained.quantize:
        raise ValueError(
            "--onto-original: the adapter's base is in 4 bits itself, made by init='loftq' or read "
            "from a quantized folder, and not quantized from originals: leave the flag out"
        )
    if args.onto_original:
        merging = open_model(args.model, args.adapter, quantize="none", device=args.device)
        notes = list(merging.notes)
    notes += merged_folder(merging, out, DTYPES.get(args.dtype)).warnings
    written = load_model(out, dtype=torch.float32)
    got = probe_logits(written, ids)
    facts: dict[str, Any] = {
        "out": str(out),
        "base": str(merging.source),
        "trained_on": code or "dense",
        "merged_onto": "16-bit originals" if args.onto_original else code or "dense",
        "dtype": own_dtype(out),
        "largest_logit": wanted.abs().max().item(),
        "largest_logit_difference": (got - wanted).abs().max().item(),
        "same_next_token": (got.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
        "notes": notes,
    }
    if args.json:
        print(json.dumps(facts))
        return 0
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {out} ({facts['dtype']}), merged onto {facts['merged_onto']}")
    print(
        f"against the unmerged model, on {len(ids)} tokens: logits differ by at most "
        f"{facts['largest_logit_difference']:.3g} of {facts['largest_logit']:.3g}; the likeliest "
        f"next token is the same at {facts['same_next_token']:.1%} of them"
    )
    return 0
