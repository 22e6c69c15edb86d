"""Exactness, side by side with PEFT and bitsandbytes on the same weights. Nothing here is timed.

    python -m benchmarks.differences

Each row is one promise of this library, the figure measured here, and the same figure for the peer
under the default settings of a plain script. Sizes are those of a small Llama; the seed is fixed.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import lora_core as lc
from benchmarks.harness import machine, version
from lora_core.quant.double_quant import dynamic_map

N, K, RANK = 512, 768, 16
NAMES = ("q_proj", "k_proj", "v_proj")


class Tiny(nn.Module):
    """Three linear layers by name, as adapters want to find them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            self.add_module(name, nn.Linear(K, N, bias=False, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the three projections."""
        return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)


def weights(model: nn.Module) -> list[Tensor]:
    """The base weights, in order."""
    found = [m for _, m in model.named_modules() if type(m) is nn.Linear and m.weight.shape[0] == N]
    return [m.weight.detach().clone() for m in found if m.weight.shape == (N, K)]


def randomize(model: nn.Module) -> None:
    """Give every adapter the same random, small update."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)


def peft_model(dtype: torch.dtype, **options: Any) -> Any:
    """Tiny under PEFT, its update randomized."""
    import peft

    settings = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(NAMES)}
    model = peft.get_peft_model(Tiny(dtype), peft.LoraConfig(**{**settings, **options}))
    randomize(model)
    return model


def our_model(dtype: torch.dtype) -> nn.Module:
    """Tiny with this library's LoRA, its update randomized."""
    model = Tiny(dtype)
    lc.add_adapter(model, lc.LoRAConfig(r=RANK, alpha=2 * RANK))
    randomize(model)
    return model


def changed(before: list[Tensor], after: list[Tensor]) -> str:
    """Share of the weights whose bits differ."""
    bad = sum((a != b).sum().item() for a, b in zip(before, after, strict=True))
    return f"{bad / sum(t.numel() for t in before):.1%} of weights changed"


def unmerge(dtype: torch.dtype) -> tuple[str, str]:
    """Merge and unmerge once: how many weights come back different."""
    ours, theirs = our_model(dtype), peft_model(dtype)
    first, second = weights(ours), weights(theirs)
    lc.merge_adapters(ours)
    lc.unmerge_adapters(ours)
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    return changed(first, weights(ours)), changed(second, weights(theirs))


def rounding() -> tuple[str, str]:
    """Merge into bfloat16: share of weights that are not the correctly rounded sum."""
    ours = our_model(torch.bfloat16)
    wanted = []
    for host in (getattr(ours, name) for name in NAMES):
        exact = host.base.weight.double() + host.scaling * (host.B.double() @ host.A.double())
        wanted.append(exact.bfloat16())

    def peft_merged(safe: bool) -> nn.Module:
        theirs = peft_model(torch.bfloat16)
        for name in NAMES:  # the same update, so that the correctly rounded sums are the same
            layer, host = getattr(theirs.model, name), getattr(ours, name)
            layer.lora_A.default.weight.data.copy_(host.A)
            layer.lora_B.default.weight.data.copy_(host.B)
        return theirs.merge_and_unload(safe_merge=safe)

    def off(model: nn.Module) -> str:
        got = [getattr(model, n).weight for n in NAMES]
        bad = sum((a != b).sum().item() for a, b in zip(got, wanted, strict=True))
        return f"{bad / sum(t.numel() for t in wanted):.3%} not correctly rounded"

    theirs = f"{off(peft_merged(False))}; safe_merge: {off(peft_merged(True))}"
    lc.unload_adapters(ours, merge=True)
    return off(ours), theirs


def misspelt() -> tuple[str, str]:
    """One of two target names misspelt."""

    def outcome(make: Callable[[], object]) -> str:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                make()
            except ValueError as error:
                return f"error: {str(error)[:60]}…"
        return f"{len(heard)} warnings, trains the rest"

    wrong = ["q_proj", "v_porj"]
    ours = outcome(lambda: lc.add_adapter(Tiny(torch.float32), lc.LoRAConfig(targets=wrong)))
    return ours, outcome(lambda: peft_model(torch.float32, target_modules=wrong))


def averaged() -> tuple[str, str]:
    """The mean of two rsLoRA adapters, against the exact mean of their updates."""
    options = {"use_rslora": True}
    ours, theirs = Tiny(torch.float32), peft_model(torch.float32, **options)
    import peft

    config = lc.LoRAConfig(r=RANK, alpha=2 * RANK, **options)
    lc.add_adapter(ours, config, "a")
    lc.add_adapter(ours, config, "b")
    targets = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(NAMES)}
    theirs.add_adapter("other", peft.LoraConfig(**targets, **options))
    exact = {}
    torch.manual_seed(4)
    for name in NAMES:
        host, layer = getattr(ours, name), getattr(theirs.model, name)
        for pair, key in (("a", "default"), ("b", "other")):
            for factor in (host.adapter(pair).A, host.adapter(pair).B):
                nn.init.normal_(factor, std=0.02)
            layer.lora_A[key].weight.data.copy_(host.adapter(pair).A)
            layer.lora_B[key].weight.data.copy_(host.adapter(pair).B)
        exact[name] = sum(host.adapter(pair).delta_weight(torch.float64) / 2 for pair in "ab")
    lc.combine_adapters(ours, ["a", "b"], [0.5, 0.5])
    theirs.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean", "linear")

    def off(deltas: dict[str, Tensor]) -> str:
        worst = max(float((deltas[n] - exact[n]).norm() / exact[n].norm()) for n in NAMES)
        return f"{worst:.1e} off" if worst < 1e-3 else f"{worst:.0%} off"

    mine = {n: getattr(ours, n).adapter("combined").delta_weight() for n in NAMES}
    return off(mine), off({n: getattr(theirs.model, n).get_delta_weight("mean") for n in NAMES})


def disabled() -> tuple[str, str]:
    """Outputs with the adapter disabled after its biases were trained, against the base's."""
    x = torch.randn(8, K)

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(K, N))

    plain = base()(x)
    import peft

    ours, config = base(), {"r": RANK, "bias": "all"}
    lc.add_adapter(ours, lc.LoRAConfig(targets=["0"], **config))
    theirs = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["0"], **config))
    for model in (ours, theirs):
        randomize(model)
    with lc.disable_adapters(ours):
        mine = ours(x)
    with theirs.disable_adapter():
        other = theirs(x)
    found = [float((y - plain).abs().max()) for y in (mine, other)]
    first, second = ("bit-equal" if gap == 0 else f"differs by {gap:.1e}" for gap in found)
    return first, second


def double_quant() -> tuple[str, str]:
    """Double quantization: scales whose 8-bit code is not the nearest entry of the map."""
    import bitsandbytes.functional as bnb

    torch.manual_seed(2)
    w = torch.randn(2048, 4096)
    q = lc.quantize_nf4(w)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    table = dynamic_map().double()
    absmax = lc.quantize_nf4(w, double_quant=False).absmax

    def off(codes: Tensor, nested: Tensor, offset: Tensor) -> str:
        group = torch.arange(len(absmax)) // 256
        value = (absmax.double() - offset.double()) / nested.double()[group]
        best = (value[:, None] - table).abs().min(dim=1).values
        chosen = (value - table[codes.long()]).abs()
        return f"{(chosen > best + 1e-6).sum().item()} of {len(absmax)} scales not nearest"

    assert torch.equal(q.packed, packed.view(-1))
    ours = off(q.scales, q.scale_absmax, q.scale_offset)
    return ours, off(state.absmax.view(-1), state.state2.absmax, state.offset)


def odd_rows() -> tuple[str, str]:
    """Dequantize a matrix whose rows are no whole blocks (K = 96, blocks of 64)."""
    import bitsandbytes.functional as bnb

    torch.manual_seed(3)
    w = torch.randn(64, 96)
    ours = lc.quantize_nf4(w, double_quant=False).dequantize()
    theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(w, quant_type="nf4"))
    return tuple(f"mean |error| {(w - t).abs().mean():.4f}" for t in (ours, theirs))  # type: ignore[return-value]


def after_eval() -> tuple[str, str]:
    """state_dict() of a 4-bit layer after one forward in eval mode, in bfloat16."""
    import bitsandbytes as bnb

    linear = nn.Linear(256, 128, bias=False)
    ours = lc.NF4Linear.from_linear(linear, double_quant=False)
    theirs = bnb.nn.Linear4bit(
        256, 128, bias=False, quant_type="nf4", compress_statistics=False,
        compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs.weight = bnb.nn.Params4bit(
        linear.weight.detach().bfloat16(), quant_type="nf4", compress_statistics=False
    )
    theirs = theirs.to("cpu")

    def outcome(layer: nn.Module) -> str:
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        with torch.no_grad():
            layer.eval()(torch.randn(4, 256, dtype=torch.bfloat16))
        after = layer.state_dict()
        differs = [
            k
            for k, v in before.items()
            if v.shape != after[k].shape
            or v.dtype != after[k].dtype
            or not torch.equal(v, after[k])
        ]
        return "unchanged" if not differs else f"{', '.join(differs)} changed"

    return outcome(ours), outcome(theirs)


ROWS: dict[str, tuple[str, Callable[[], tuple[str, str]]]] = {
    "merge, unmerge, float32": ("PEFT", lambda: unmerge(torch.float32)),
    "merge, unmerge, bfloat16": ("PEFT", lambda: unmerge(torch.bfloat16)),
    "merge into bfloat16": ("PEFT", rounding),
    "one target misspelt": ("PEFT", misspelt),
    "mean of two rsLoRA adapters": ("PEFT, linear", averaged),
    "disabled, trained biases": ("PEFT", disabled),
    "double quantization": ("bitsandbytes", double_quant),
    "NF4, rows no multiple of the block": ("bitsandbytes, CPU", odd_rows),
    "4-bit state_dict after one evaluation": ("bitsandbytes, CPU", after_eval),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the peers' chatter out of the table."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def main() -> None:
    """Print the table."""
    facts = machine()
    peers = ", ".join(f"{name} {version(name)}" for name in ("peft", "bitsandbytes"))
    print(f"{facts['machine']}, torch {facts['torch']}, {peers}\n")
    print("| | lora-core | peer | |\n|---|---|---|---|")
    for title, (peer, measure) in ROWS.items():
        with quiet():
            ours, theirs = measure()
        print(f"| {title} | {ours} | {theirs} | {peer} |")


if __name__ == "__main__":
    main()
