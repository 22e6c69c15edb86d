"""Every method that trains a part of a model, as one list: configuration, formula, source, peer.

    python -m benchmarks.methods           prints the table of docs/adapters.md
    python -m benchmarks.methods --write   puts it there

What a method can do is not written down here: `abilities` tries it on a small model. Each trial
compares outputs, so a "yes" means that it works, not that nothing was raised.
"""

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_core as lc
from lora_core.adapters import AdapterHubConfig
from lora_core.checkpoint.export import export_adapter

__all__ = ["METHODS", "Method", "abilities", "adapted", "peer", "shake", "small_model", "table"]

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"
MARK = ("<!-- methods: made by `python -m benchmarks.methods` -->", "<!-- end of methods -->")


@dataclass(frozen=True)
class Method:
    """One way to train a part of a model.

    Attributes:
        name: what papers call it.
        config: makes the configuration for a rank (or width) r and the model's hidden and
            intermediate sizes.
        formula: what is computed, in a line.
        count: trained parameters a layer, in a line.
        source: paper and place.
        peer: PEFT's configuration for the same, or None.
        changes_base: whether adding it replaces the base's weights.
    """

    name: str
    config: Callable[[int, int, int], Any]
    formula: str
    count: str
    source: str
    peer: Callable[[int], Any] | None = None
    changes_base: bool = False


def _lora(**options: Any) -> Callable[[int, int, int], Any]:
    return lambda r, *_: lc.LoRAConfig(r=r, alpha=2 * r, **options)


def _fused(r: int, hidden: int, inner: int) -> Any:
    """A projection of two halves, as if two layers had been fused."""
    halves = [inner // 2, inner // 2]
    return lc.LoRAConfig(r=r, alpha=2 * r, targets=["up_proj"], parts={"up_proj": halves})


def _bottleneck(placement: str) -> Callable[[int, int, int], Any]:
    return lambda r, hidden, _: lc.BottleneckConfig(reduction=hidden / r, placement=placement)


def _peft(kind: str = "LoraConfig", **options: Any) -> Callable[[int], Any]:
    def make(r: int) -> Any:
        import peft

        if kind == "LoraConfig":
            same = {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", **options}
            return peft.LoraConfig(task_type="CAUSAL_LM", **same)
        return getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=r, **options)

    return make


METHODS = (
    Method(
        "LoRA",
        _lora(),
        "W x + (α/r) B A x",
        "r (K + N)",
        "arXiv:2106.09685, section 4.1",
        _peft(),
    ),
    Method(
        "rsLoRA",
        _lora(use_rslora=True),
        "W x + (α/√r) B A x",
        "r (K + N)",
        "arXiv:2312.03732",
        _peft(use_rslora=True),
    ),
    Method(
        "DoRA",
        _lora(use_dora=True),
        "m (W + s B A) x / ‖W + s B A‖ by rows",
        "r (K + N) + N",
        "arXiv:2402.09353, equation 5",
        _peft(use_dora=True),
    ),
    Method(
        "PiSSA",
        _lora(init="pissa"),
        "W x + s (B A − B₀ A₀) x, s B₀ A₀ = U_r S_r V_rᵀ",
        "r (K + N)",
        "arXiv:2404.02948, equations 2 to 4",
        _peft(init_lora_weights="pissa"),
    ),
    Method(
        "OLoRA",
        _lora(init="olora"),
        "W x + s (B A − B₀ A₀) x, B₀ = Q_r, A₀ = R_r",
        "r (K + N)",
        "arXiv:2406.01775, section 3",
        _peft(init_lora_weights="olora"),
    ),
    Method(
        "LoftQ",
        _lora(init="loftq"),
        "Q x + s B A x, Q + s B A ≈ W",
        "r (K + N)",
        "arXiv:2310.08659, algorithm 1",
        changes_base=True,
    ),
    Method(
        "LoRA, fused parts",
        _fused,
        "W x + s [B₁ A₁; …; B_p A_p] x",
        "r (p K + N)",
        "arXiv:2106.09685, section 4.2",
    ),
    Method(
        "LoRA, embedding",
        _lora(targets=["embed_tokens"], untie=True),
        "E[i] + s (B A)[:, i]",
        "r (V + D)",
        "arXiv:2106.09685, section 4.1",
        _peft(target_modules=["embed_tokens"]),
    ),
    Method(
        "LoRA and biases",
        _lora(lora_bias=True),
        "W x + b + s (B A x + b_B)",
        "r (K + N) + N",
        "arXiv:2106.10199, section 3",
        _peft(lora_bias=True),
    ),
    Method(
        "Full copies",
        _lora(targets=["q_proj"], modules_to_save=["norm"]),
        "W′ x",
        "all of the module's",
        "none: plain training",
        _peft(target_modules=["q_proj"], modules_to_save=["norm"]),
    ),
    Method(
        "Token rows",
        _lora(targets=["q_proj"], trainable_token_indices=[1, 2]),
        "E′[i] for the i named, else E[i]",
        "n D",
        "none: plain training",
        _peft(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    ),
    Method(
        "Bottleneck, Houlsby",
        _bottleneck("houlsby"),
        "h + f(h), f = U act(D h), twice a layer",
        "2 (2 d m + d + m)",
        "arXiv:1902.00751, section 2",
    ),
    Method(
        "Bottleneck, Pfeiffer",
        _bottleneck("pfeiffer"),
        "h + f(h) after the feed-forward",
        "2 d m + d + m",
        "arXiv:2005.00247",
    ),
    Method(
        "Bottleneck, parallel",
        _bottleneck("parallel"),
        "h + s f(x) beside the feed-forward",
        "2 d m + d + m",
        "arXiv:2110.04366, table 1",
    ),
    Method(
        "Bottleneck, AdapterHub",
        lambda r, hidden, _: AdapterHubConfig(reduction=hidden / r),
        "at the residual sum: their seq_bn",
        "2 d m + d + m",
        "arXiv:2005.00247",
    ),
    Method(
        "Prompt tuning",
        lambda r, *_: lc.PromptTuningConfig(num_virtual_tokens=r),
        "P vectors before the embedded text",
        "P C once",
        "arXiv:2104.08691, section 2",
        _peft("PromptTuningConfig"),
    ),
    Method(
        "Prefix tuning",
        lambda r, *_: lc.PrefixTuningConfig(num_virtual_tokens=r, projection=False),
        "attention over [P; K], [Q; V]",
        "2 P H D (H key/value heads)",
        "arXiv:2101.00190, section 4.2",
        _peft("PrefixTuningConfig"),
    ),
    Method(
        "Prefix tuning, MLP",
        lambda r, *_: lc.PrefixTuningConfig(num_virtual_tokens=r, projection=True, hidden=64),
        "the same, of W₂ tanh(W₁ e)",
        "2 H D (h + 1), and P C + h (C + 1) once",
        "arXiv:2101.00190, section 4.3",
        _peft("PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=64),
    ),
    Method(
        "P-tuning, MLP",
        lambda r, *_: lc.PTuningConfig(num_virtual_tokens=r, hidden=64),
        "prompt tuning of MLP(e)",
        "P C + 2 C h + h² + 2 h + C once",
        "arXiv:2103.10385, section 2",
        _peft("PromptEncoderConfig", encoder_hidden_size=64),
    ),
    Method(
        "P-tuning, LSTM",
        lambda r, *_: lc.PTuningConfig(num_virtual_tokens=r, encoder="lstm", hidden=64),
        "prompt tuning of MLP(biLSTM(e))",
        "an LSTM's and an MLP's, once",
        "arXiv:2103.10385, section 2",
        _peft(
            "PromptEncoderConfig",
            encoder_hidden_size=64,
            encoder_reparameterization_type="LSTM",
            encoder_num_layers=2,
            encoder_dropout=0.0,
        ),
    ),
)


def small_model(seed: int = 0) -> nn.Module:
    """A decoder of two layers with random weights."""
    torch.manual_seed(seed)
    model = lc.CausalLM(lc.ModelConfig(**SIZES))
    model.init_weights(0.2)
    return model.eval().requires_grad_(False)


def adapted(model: nn.Module, method: Method, r: int, name: str = "default") -> nn.Module:
    """The model with the method's adapter, its parameters moved off their start."""
    config: Any = model.config
    made = method.config(r, config.hidden_size, config.intermediate_size)
    lc.add_adapter(model, made, name)
    shake(model, len(name))
    return model


def shake(model: nn.Module, seed: int = 0) -> None:
    """Move everything that is trained off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise, alpha=0.05)


def peer(model: nn.Module, method: Method, r: int) -> Any:
    """PEFT's model for the same method around a transformers model; None where it has none."""
    if method.peer is None:
        return None
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, method.peer(r))


def abilities(method: Method) -> dict[str, str]:
    """What a method can do, tried on a small model.

    Returns:
        merge, mix, stack, 4-bit base, file, export: "yes", "no", or how.
    """
    return {
        "merge": _merges(method),
        "mix": _mixes(method),
        "stack": _stacks(method),
        "4-bit base": _on_four_bits(method),
        "file": _file(method),
        "export": _export(method),
    }


def _ids() -> Tensor:
    return torch.arange(24).view(3, 8) * 3 % SIZES["vocab_size"]


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(_ids()).logits


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal to the rounding of a few float32 layers."""
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def _merges(method: Method) -> str:
    model = adapted(small_model(), method, 2)
    before = _logits(model)
    try:
        lc.merge_adapters(model)
    except ValueError:
        return "no"
    return "yes" if _close(_logits(model), before) else "wrong"


def _mixes(method: Method) -> str:
    if method.changes_base:
        return "no: its own base"
    model = small_model()
    wanted = {None: _logits(model)}
    for name in ("a", "bb"):
        adapted(model, method, 2, name)
        wanted[name] = _logits(model)
    names = ["bb", None, "a"]
    try:
        with lc.adapter_rows(model, names):
            got = _logits(model)
    except ValueError:
        return "no"
    right = all(_close(got[i], wanted[name][i]) for i, name in enumerate(names))
    kinds = {
        a.mixes for _, host in lc.adapters.adapted_modules(model) for a in host.adapters.values()
    }
    return ("grouped" if kinds == {"grouped"} else "row by row") if right else "wrong"


def _stacks(method: Method) -> str:
    if method.changes_base:
        return "no: its own base"
    model = adapted(small_model(), method, 2, "a")
    alone = _logits(model)
    adapted(model, method, 2, "bb")
    try:
        lc.set_adapters(model, ["a", "bb"])
    except ValueError:
        return "no"
    return "yes" if not _close(_logits(model), alone) else "wrong"


def _on_four_bits(method: Method) -> str:
    model = small_model()
    if method.changes_base:
        return "makes it"
    lc.quantize_model(model)
    plain = _logits(model)
    try:
        adapted(model, method, 2)
    except ValueError:
        return "no"
    with lc.disable_adapters(model):
        same = torch.equal(_logits(model), plain)
    return "yes" if same and not torch.equal(_logits(model), plain) else "wrong"


def _file(method: Method) -> str:
    """Whose format it is saved in; read back with equal outputs."""
    model = adapted(small_model(), method, 2)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lc.save_adapter(model, folder)
        config, _ = lc.checkpoint.read_adapter(folder)
        base = copy.deepcopy(small_model())
        if method.changes_base:
            base = model
            lc.delete_adapter(model, "default")
            wanted = None
        else:
            wanted = _logits(model)
        lc.load_adapter(base, folder, "again")
    if wanted is not None and not _close(_logits(base), wanted):
        return "wrong"
    if not config["peft_type"].startswith("LORA_CORE_"):
        return "PEFT"
    with tempfile.TemporaryDirectory() as folder:
        try:
            lc.save_adapterhub(model, folder)
        except ValueError:
            return "own"
    return "own, AdapterHub"


def _export(method: Method) -> str:
    """Who reads a baked copy by its own rules, the library's own reader of each."""
    model = adapted(small_model(), method, 2)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lc.save_adapter(model, f"{folder}/made")
        try:
            report = export_adapter(f"{folder}/made", f"{folder}/baked", bake=True)
        except ValueError:
            report = None
        others = [name for name in (report.errors if report else ()) if name != "peft"]
        if report is None and method.config(2, 32, 64).__class__ is not lc.LoRAConfig:
            return "no"
        if others:
            return ", ".join(others)
        base = small_model()
        try:
            export_adapter(f"{folder}/made", f"{folder}/svd", bake=True, to_lora=8, model=base)
        except ValueError:
            return "merged only"
    return "by SVD"


def table() -> str:
    """The Markdown table of docs/adapters.md."""
    heads = ["method", "computes", "parameters a layer", "source"]
    rows = []
    for method in METHODS:
        can = abilities(method)
        heads = [*heads[:4], *can]
        cells = [method.name, method.formula, method.count, method.source, *can.values()]
        rows.append("| " + " | ".join(cells) + " |")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *rows]
    return "\n".join([MARK[0], *lines, MARK[1]])


def main(argv: Sequence[str]) -> None:
    """Print the table, or put it where it belongs."""
    made = table()
    if "--write" not in argv:
        print(made)
        return
    text = PAGE.read_text()
    head, rest = text.split(MARK[0])
    PAGE.write_text(head + made + rest.split(MARK[1])[1])


if __name__ == "__main__":
    main(sys.argv[1:])
