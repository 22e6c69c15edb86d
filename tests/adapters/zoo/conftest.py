"""A zoo of models that are not this library's, the methods that apply to each, and their truth.

Every test that asks for one of the fixtures in `PAIRS` runs once for each (model, method) in it.
The truth of a method that ends in weights is computed here from the papers' formulas, in float64,
by plain dense matrices: none of the adapters' own arithmetic is used.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.adapters import (
    Adapter,
    BottleneckConfig,
    LoRA,
    LoRAConfig,
    TrainableTokens,
    adapted_modules,
    add_adapter,
)
from lora_core.adapters.biases import TrainedBias
from lora_core.adapters.dora import DoRA
from lora_core.adapters.full import FullCopy
from lora_core.adapters.prefix import PrefixTuningConfig
from lora_core.adapters.prompt import PromptTuningConfig
from lora_core.adapters.ptuning import PTuningConfig
from lora_core.testing.bounds import gamma

VOCABULARY = 31

# --- models ---


class Perceptron(nn.Module):
    """Linear layers and a norm; the second is a fusion of two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 24)
        self.fused = nn.Linear(24, 36, bias=False)
        self.norm = nn.LayerNorm(18)
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fused(torch.tanh(self.inp(x))).chunk(2, dim=-1)
        return self.head(self.norm(torch.sigmoid(gate) * up))


class ConvNet(nn.Module):
    """Plain, strided, grouped, depthwise, dilated, circular, 1-d and 3-d; BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv2d(12, 8, 3, stride=2, padding=2, dilation=2, groups=4)
        self.circular = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")
        self.volume = nn.Conv3d(1, 8, (2, 2, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(x)))
        h = torch.tanh(self.grouped(torch.relu(self.pointwise(self.depthwise(h)))))  # (B, 8, 3, 3)
        h = torch.tanh(self.circular(h.flatten(2)))  # (B, 8, 9)
        h = self.volume(h.view(len(h), 1, 8, 9, 1))  # (B, 8, 7, 8, 1)
        return self.head(h.mean((2, 3, 4)))


class CrossAttention(nn.Module):
    """Attention over a context, by linear layers; keys and values in one."""

    def __init__(self, size: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(size, size, bias=False)
        self.to_kv = nn.Linear(context, 2 * size, bias=False)
        self.to_out = nn.Sequential(nn.Linear(size, size), nn.Dropout(0.1))

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        x = h.flatten(2).transpose(1, 2)  # (B, T, C)
        key, value = self.to_kv(context).chunk(2, dim=-1)
        x = self.to_out(F.scaled_dot_product_attention(self.to_q(x), key, value))
        return h + x.transpose(1, 2).view(h.shape)


class UNet(nn.Module):
    """One level down and up again, conditioned by a step and by a context, as in diffusion."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.step = nn.Linear(1, 16)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.attn = CrossAttention(16, 10)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.conv_out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, step: Tensor, context: Tensor) -> Tensor:
        skip = F.silu(self.conv_in(x))  # (B, 8, H, W)
        h = self.norm(self.down(skip)) + self.step(step)[:, :, None, None]
        h = self.up(F.silu(self.attn(h, context=context)))
        return self.conv_out(torch.cat([h, skip], 1))


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, seed: int = 7) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def _float_of(model: nn.Module) -> torch.dtype:
    """Dtype of the model's first floating-point weight that is no adapter's."""
    return next(p.dtype for k, p in model.named_parameters() if "adapters" not in k)


def _on(model: nn.Module, *inputs: Tensor, **more: Tensor) -> Tensor:
    """The model's output (`.logits` of transformers' models) on inputs in its dtype."""
    dtype = _float_of(model)
    out = model(
        *(x.to(dtype) for x in inputs),
        **{k: x.to(dtype) if x.is_floating_point() else x for k, x in more.items()},
    )
    return out if isinstance(out, Tensor) else out.logits


@dataclass(frozen=True)
class Animal:
    """A model: how it is built and called, and what its parts are called."""

    make: Callable[[Any], nn.Module]  # takes transformers, or nothing that matters
    call: Callable[[nn.Module], Tensor]
    linear: list[str]
    full: list[str]  # modules to train whole
    peer: bool = False  # transformers'
    embedding: list[str] = field(default_factory=list)
    convolutions: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)  # of convolutions too small for 8
    parts: dict[str, list[int]] = field(default_factory=dict)
    rows: dict[str, list[int]] | None = None
    rows_of_embedding_alone: bool = False
    bottleneck: BottleneckConfig | None = None
    soft: bool = False  # a language model that takes prompts
    prefix: bool = False


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _llama(t: Any) -> nn.Module:
    return t.LlamaForCausalLM(
        t.LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=4, tie_word_embeddings=True)
    )


def _mixtral(t: Any) -> nn.Module:
    """Experts are one tensor a projection, no modules; by the plain loop, which takes float64."""
    config = t.MixtralConfig(**SMALL, num_key_value_heads=2, head_dim=4, num_local_experts=4)
    config._experts_implementation = "eager"
    return t.MixtralForCausalLM(config)


def _gpt2(t: Any) -> nn.Module:
    return t.GPT2LMHeadModel(t.GPT2Config(**SMALL, n_inner=20))


def _bert(t: Any) -> nn.Module:
    return t.BertForSequenceClassification(t.BertConfig(**SMALL, num_labels=6))


def _t5(t: Any) -> nn.Module:
    return t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=20, num_layers=1, num_heads=4,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
        )
    )  # fmt: skip


def _vit(t: Any) -> nn.Module:
    sizes = {k: SMALL[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")}
    return t.ViTForImageClassification(
        t.ViTConfig(**sizes, num_hidden_layers=1, image_size=8, patch_size=4, num_labels=6)
    )


def _language(model: nn.Module) -> Tensor:
    return _on(model, input_ids=tokens(2, 7))


ATTENTION = [f"{x}_proj" for x in "qkvo"]
ZOO: dict[str, Animal] = {
    "perceptron": Animal(
        make=lambda _: Perceptron(),
        call=lambda m: _on(m, noise(3, 4, 12)),
        linear=["inp", "fused"],
        full=["norm", "head"],
        parts={"fused": [18, 18]},
        bottleneck=BottleneckConfig(4, feed_forward=["inp", "fused"]),
    ),
    "convnet": Animal(
        make=lambda _: ConvNet(),
        call=lambda m: _on(m, noise(2, 3, 6, 6)),
        linear=["head"],
        full=["norm", "pointwise"],
        convolutions=["stem", "depthwise", "pointwise", "grouped", "circular", "volume"],
        ranks={"volume": 4},
    ),
    "unet": Animal(
        make=lambda _: UNet(),
        call=lambda m: _on(m, noise(2, 3, 6, 6), noise(2, 1), noise(2, 5, 10)),
        linear=["to_q", "to_kv", "to_out.0"],
        full=["norm", "up"],
        convolutions=["conv_in", "down", "conv_out"],
        ranks={"conv_out": 2},
        parts={"to_kv": [16, 16]},
        bottleneck=BottleneckConfig(4, feed_forward=["attn.to_out"], activation="silu"),
    ),
    "llama": Animal(
        make=_llama,
        call=_language,
        peer=True,
        linear=[*ATTENTION, "gate_proj", "up_proj", "down_proj"],
        full=["input_layernorm", "model.norm"],
        rows={"embed_tokens": [3, 9, 4]},
        bottleneck=BottleneckConfig(4, placement="houlsby"),
        soft=True,
        prefix=True,
    ),
    "mixtral": Animal(
        make=_mixtral,
        call=_language,
        peer=True,
        linear=ATTENTION,
        full=["lm_head", "model.norm"],
        embedding=["embed_tokens"],
        rows={"embed_tokens": [3, 9], "lm_head": [4]},
        soft=True,
        prefix=True,
    ),
    "gpt2": Animal(
        make=_gpt2,
        call=_language,
        peer=True,
        linear=["c_attn", "c_fc", "mlp.c_proj"],
        full=["ln_f", "h.1.ln_1"],
        embedding=["wpe"],
        rows={"wte": [3, 9]},
        bottleneck=BottleneckConfig(4, placement="parallel"),
        soft=True,
        prefix=True,
    ),
    "bert": Animal(
        make=_bert,
        call=lambda m: _on(m, input_ids=tokens(3, 7), attention_mask=tokens(3, 7, seed=2) > 4),
        peer=True,
        linear=["query", "value", "output.dense"],
        full=["classifier"],
        embedding=["word_embeddings"],
        rows={"word_embeddings": [3, 9]},
        rows_of_embedding_alone=True,
        bottleneck=BottleneckConfig(4, placement="parallel"),
    ),
    "t5": Animal(
        make=_t5,
        call=lambda m: _on(m, input_ids=tokens(2, 7), decoder_input_ids=tokens(2, 4, seed=1)),
        peer=True,
        linear=["q", "v", "wi", "wo"],
        full=["final_layer_norm"],
        rows={"shared": [3, 9]},
        bottleneck=BottleneckConfig(4, feed_forward=["wo"]),
    ),
    "vit": Animal(
        make=_vit,
        call=lambda m: _on(m, pixel_values=noise(2, 3, 8, 8)),
        peer=True,
        linear=["q_proj", "v_proj", "fc1", "fc2"],
        full=["classifier", "layernorm"],
        convolutions=["projection"],
    ),
}

# --- methods ---


@dataclass(frozen=True)
class Method:
    """A method on an animal."""

    config: Any
    merges: bool = True
    exact_start: bool = True  # the output of a new one is the base's, to the bit
    adds: bool = True  # the change of the weights of two is the sum of their changes


def methods(animal: Animal) -> dict[str, Method]:
    """What applies to an animal."""
    lin: dict[str, Any] = {"targets": animal.linear}
    first, last = animal.linear[0], animal.linear[-1]
    found = {
        "lora": Method(LoRAConfig(r=4, alpha=8, **lin)),
        "rslora": Method(LoRAConfig(r=4, alpha=3, use_rslora=True, init="gaussian", **lin)),
        "patterns": Method(
            LoRAConfig(r=3, alpha=-2, rank_pattern={first: 1}, alpha_pattern={last: 5}, **lin)
        ),
        "all-linear": Method(LoRAConfig(r=1, alpha=2)),
        "dora": Method(LoRAConfig(r=4, alpha=8, use_dora=True, **lin), adds=False),
        "dora-biases": Method(
            LoRAConfig(r=2, alpha=2, use_dora=True, bias="all", lora_bias=True, **lin), adds=False
        ),
        "pissa": Method(LoRAConfig(r=3, alpha=2, init="pissa", **lin), exact_start=False),
        "olora": Method(LoRAConfig(r=3, alpha=2, init="olora", **lin), exact_start=False),
        "biases": Method(LoRAConfig(r=2, alpha=6, bias="all", **lin)),
        "biases-of-targets": Method(LoRAConfig(r=2, alpha=6, bias="lora_only", **lin)),
        "bias-of-B": Method(LoRAConfig(r=2, alpha=6, lora_bias=True, use_rslora=True, **lin)),
        "full": Method(LoRAConfig(r=2, modules_to_save=animal.full, **lin), adds=False),
    }
    if animal.parts:
        found["parts"] = Method(LoRAConfig(r=2, alpha=3, parts=animal.parts, **lin))
    if animal.embedding:
        found["embedding"] = Method(LoRAConfig(r=4, alpha=2, targets=animal.embedding))
        found["embedding-dora"] = Method(
            LoRAConfig(r=4, alpha=2, use_dora=True, targets=animal.embedding), adds=False
        )
    if animal.convolutions:
        conv: dict[str, Any] = {"targets": animal.convolutions, "r": 8}
        conv["rank_pattern"] = animal.ranks
        found["convolutions"] = Method(LoRAConfig(alpha=8, **conv))
        found["convolutions-biases"] = Method(LoRAConfig(alpha=4, bias="all", **conv))
        found["convolutions-dora"] = Method(LoRAConfig(alpha=8, use_dora=True, **conv), adds=False)
    if animal.rows:
        found["rows"] = Method(
            LoRAConfig(r=2, trainable_token_indices=animal.rows, **lin),
            # logits of rows by themselves are another product than those of the whole head
            exact_start=animal.rows_of_embedding_alone,
            adds=False,
        )
    if animal.bottleneck:
        found["bottleneck"] = Method(animal.bottleneck, merges=False, adds=False)
    virtual: dict[str, Any] = {"merges": False, "exact_start": False, "adds": False}
    if animal.soft:
        found["prompt"] = Method(PromptTuningConfig(3), **virtual)
        found["ptuning"] = Method(PTuningConfig(3, hidden=6), **virtual)
    if animal.prefix:
        found["prefix"] = Method(PrefixTuningConfig(3), **virtual)
        found["prefix-projected"] = Method(
            PrefixTuningConfig(3, projection=True, hidden=6), **virtual
        )
    return found


EVERY = {(name, key): m for name, animal in ZOO.items() for key, m in methods(animal).items()}
# the quick run has every method on the small models of ours and, of transformers', on some model
QUICK = {
    "perceptron": "lora rslora patterns all-linear dora dora-biases pissa olora biases "
    "biases-of-targets bias-of-B full parts bottleneck",
    "convnet": "full convolutions convolutions-biases convolutions-dora",
    "unet": "lora biases full parts convolutions-dora bottleneck",
    "llama": "lora pissa rows prompt prefix-projected",
    "mixtral": "all-linear embedding",
    "gpt2": "dora-biases embedding-dora bottleneck ptuning prefix",
    "bert": "biases full embedding",
    "t5": "lora rows",
    "vit": "convolutions",
}
FULL = os.environ.get("LORA_TEST_FULL") == "1"


# a few that differ in what they ask of PyTorch
CHOSEN = {
    "perceptron": "lora dora-biases parts pissa full bottleneck",
    "convnet": "convolutions convolutions-dora",
    "unet": "lora",
    "llama": "lora rows prompt prefix-projected",
    "gpt2": "dora-biases bottleneck",
}
# fixture: which pairs a test that asks for it runs with
PAIRS: dict[str, Callable[[str, str, Method], bool]] = {
    "subject": lambda name, key, m: True,
    "exact": lambda name, key, m: m.exact_start,
    "mergeable": lambda name, key, m: m.merges,
    "unmergeable": lambda name, key, m: not m.merges,
    "additive": lambda name, key, m: m.adds and m.merges,
    "plain": lambda name, key, m: key == "lora",
    "chosen": lambda name, key, m: key in CHOSEN.get(name, "").split(),
    "moved": lambda name, key, m: not m.exact_start and m.merges,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, wanted in PAIRS.items():
        if fixture in metafunc.fixturenames:
            pairs = [
                pytest.param(
                    (name, key),
                    id=f"{name}-{key}",
                    marks=[pytest.mark.oracle] if ZOO[name].peer else [],
                )
                for (name, key), method in EVERY.items()
                if wanted(name, key, method) and (FULL or key in QUICK[name].split())
            ]
            metafunc.parametrize(fixture, pairs, indirect=True)


# --- what a test gets ---


class Subject:
    """A model of the zoo and a method for it.

    Attributes:
        base: the model as it was; never adapted.
        model: a copy of it, where the method has been added as "default".
        config: the method's.
        method: the method.
    """

    def __init__(self, base: nn.Module, animal: Animal, method: Method) -> None:
        self.base, self.animal, self.method = base, animal, method
        self.config = method.config
        self.model = self.fresh()
        self.report = add_adapter(self.model, self.config)

    def fresh(self) -> nn.Module:
        """A copy of the base."""
        return copy.deepcopy(self.base)

    def call(self, model: nn.Module, grad: bool = False) -> Tensor:
        """The model's output on the animal's input."""
        with torch.set_grad_enabled(grad):
            return self.animal.call(model)

    def add(self, name: str, seed: int) -> None:
        """Add the method again, and give the new adapter numbers of its own."""
        add_adapter(self.model, self.config, name)
        self.fill(self.model, seed, name)

    @torch.no_grad()
    def fill(self, model: nn.Module, seed: int = 3, name: str = "default") -> None:
        """Add noise to an adapter's parameters, the shared ones once."""
        generator = torch.Generator().manual_seed(seed)
        seen: set[int] = set()
        for _, host in adapted_modules(model):
            if name in host.adapters:
                for p in host.adapter(name).parameters():
                    if id(p) not in seen:
                        seen.add(id(p))
                        p.add_(torch.randn(p.shape, generator=generator), alpha=0.2)

    def dense(self, model: nn.Module, names: tuple[str, ...] = ("default",)) -> nn.Module:
        """The base with the adapters of `model` in its weights, by the formulas, in float64."""
        made = self.fresh().double()
        modules = dict(made.named_modules(remove_duplicate=False))
        modules |= {k: modules[k] for k, _ in made.named_modules()}
        for site, host in adapted_modules(model):
            for name in names:
                if name in host.adapters:
                    put(modules[site], host.adapter(name))
        return made

    def peers(self, dense: nn.Module) -> list[Tensor]:
        """PyTorch's float32 outputs of a dense float64 model: rounded, and two roundings away."""
        outputs = [self.call(copy.deepcopy(dense).float())]
        for seed in range(3):
            generator, moved = torch.Generator().manual_seed(seed), copy.deepcopy(dense)
            with torch.no_grad():
                for p in moved.parameters():
                    shift = 2 * torch.rand(p.shape, generator=generator).double() - 1
                    p.mul_(1 + torch.finfo(torch.float32).eps * shift)
            outputs.append(self.call(moved.float()))
        return outputs


@torch.no_grad()
def put(module: nn.Module, adapter: Adapter) -> None:
    """Write an adapter into the weights of a plain float64 module."""
    if isinstance(adapter, FullCopy):
        module.load_state_dict({k: v.double() for k, v in adapter.copy.state_dict().items()})
        return
    weight, bias, *_ = formula(adapter, module)
    if weight is not None:
        module.weight.data = weight
    if bias is not None:
        module.bias = nn.Parameter(bias)


Terms = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@torch.no_grad()
def formula(adapter: Adapter, module: nn.Module) -> Terms:
    """W' and b' in float64, and how far a float32 computation of them may lie off.

    Args:
        adapter: one whose end is a weight.
        module: its plain base, in float64.

    Returns:
        (W', b', bound of W', bound of b'); None where it does not change.
    """
    own = getattr(module, "bias", None)
    bias = None if own is None else own.detach().double()
    if isinstance(adapter, TrainableTokens):
        weight = module.weight.detach().double().clone()
        weight[adapter.index] = adapter.rows.double()
        return weight, None, torch.zeros_like(weight), None
    if isinstance(adapter, TrainedBias):
        new = adapter.bias.double() - adapter.bias0.double()
        whole = new if bias is None else bias + new
        sizes = adapter.bias.abs() + adapter.bias0.abs()
        return None, whole, None, gamma(2) * (sizes.double() + whole.abs())
    assert isinstance(adapter, LoRA)
    weight, bound = low_rank(adapter, module)
    zero = torch.zeros(len(adapter.B), dtype=torch.float64)
    change, size, changed = zero, zero, False
    s = scaling(adapter)
    if adapter.up_bias is not None:
        change, size, changed = s * adapter.up_bias.double(), abs(s) * adapter.up_bias.abs(), True
    if adapter.bias is not None:
        change = change + adapter.bias.double() - adapter.bias0.double()
        size, changed = size + adapter.bias.abs() + adapter.bias0.abs(), True
    if not changed:
        return weight, None, bound, None
    whole = change if bias is None else bias + change
    return weight, whole, bound, gamma(5) * (size.double() + whole.abs())


def scaling(pair: LoRA) -> float:
    return pair.alpha / (pair.r**0.5 if pair.use_rslora else pair.r)


@dataclass
class Matrices:
    """Float64 matrices (N, K) of one low-rank pair."""

    W: Tensor
    update: Tensor  # s·B A
    size: Tensor  # |s| |B| |A|
    laid: Callable[[Tensor], Tensor]  # into the layout of the layer's weight


def matrices(pair: LoRA, module: nn.Module) -> Matrices:
    stored = module.weight.detach().double()
    turned = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
    s, g = scaling(pair), getattr(module, "groups", 1)
    new = product(pair.A, pair.B, g, pair.parts)
    size = product(pair.A.abs(), pair.B.abs(), g, pair.parts)
    if pair.A0 is not None:
        new = new - product(pair.A0, pair.B0, g, pair.parts)
        size = size + product(pair.A0.abs(), pair.B0.abs(), g, pair.parts)
    return Matrices(
        W=stored.T if turned else stored.flatten(1),
        update=s * new,
        size=abs(s) * size,
        laid=lambda t: t.T if turned else t.reshape(stored.shape),
    )


def low_rank(pair: LoRA, module: nn.Module) -> tuple[Tensor, Tensor]:
    """W + s·B A (DoRA: its rows at their lengths) in the layer's layout, and a float32 bound."""
    terms = matrices(pair, module)
    V = terms.W + terms.update
    bound = gamma(2 * len(pair.A) + 4) * (terms.W.abs() + terms.size)
    if isinstance(pair, DoRA):
        length = V.norm(dim=1, keepdim=True)
        m = pair.magnitude.double()[:, None]
        relative = bound.norm(dim=1, keepdim=True) / length + gamma(V.shape[1] + 8)
        # (first order, and a hundredth for the rest)
        bound = 1.01 * m.abs() / length * (bound + V.abs() * relative)
        V = m * V / length
    return terms.laid(V), terms.laid(bound)


@torch.no_grad()
def output_bound(pair: LoRA, module: nn.Module, x: Tensor) -> Tensor:
    """How far a layer's float32 output may lie off: its dot products' magnitudes times gamma."""
    terms = matrices(pair, module)
    n = terms.W.shape[1] + 2 * len(pair.A) + 12
    sizes = copy.deepcopy(module)
    sizes.weight.data = terms.laid(terms.W.abs() + terms.size)
    biases = [b for b in (getattr(module, "bias", None), pair.bias, pair.bias0) if b is not None]
    if pair.up_bias is not None:
        biases.append(abs(scaling(pair)) * pair.up_bias)
    if biases:
        sizes.bias = nn.Parameter(torch.stack([b.detach().double().abs() for b in biases]).sum(0))
    mass = sizes(x.double().abs() if x.is_floating_point() else x)
    if not isinstance(pair, DoRA):
        return gamma(n) * mass
    V = terms.W + terms.update
    squares = V.square().sum(1)
    cross = (terms.W.abs() * terms.size).sum(1)
    # c² = |W|² + 2 s (W Aᵀ · B) + s² (B (A Aᵀ) · B), each term summed in float32
    wide = terms.W.square().sum(1) + 2 * cross + terms.size.square().sum(1)
    gain = pair.magnitude.double().abs() / squares.sqrt()
    relative = gamma(2 * n) * wide / squares
    factor = gamma(n) * (2 + 2 * gain) + relative * gain
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        factor = factor.view(-1, *(1,) * len(module.kernel_size))
    return factor * mass


def product(A: Tensor, B: Tensor, groups: int, parts: Any) -> Tensor:
    """B A in float64, by blocks of a grouped convolution or of a fused layer's parts."""
    A, B = A.double(), B.double()
    if parts:
        return torch.cat([b @ a for a, b in zip(A.chunk(len(parts)), B.split(parts), strict=True)])
    return torch.cat([b @ a for a, b in zip(A.chunk(groups), B.chunk(groups), strict=True)])


@pytest.fixture(scope="session")
def bases(oracle: Callable) -> Callable[[str], nn.Module]:
    """The animals, built once, with weights that matter."""
    built: dict[str, nn.Module] = {}

    def base(name: str) -> nn.Module:
        if name not in built:
            animal = ZOO[name]
            torch.manual_seed(0)
            model = animal.make(oracle("transformers") if animal.peer else None)
            with torch.no_grad():
                for p in model.parameters():  # transformers' own start leaves attention flat
                    if p.dim() > 1:
                        p.normal_(std=(2 / p[0].numel()) ** 0.5)
                    else:
                        p.add_(torch.randn_like(p), alpha=0.1)
            model.train()
            animal.call(model)  # gives BatchNorm statistics
            built[name] = model.eval()
        return built[name]

    return base


@pytest.fixture(scope="session")
def adopt(bases: Callable[[str], nn.Module]) -> Callable[[str, str], Subject]:
    """Make a subject: (animal, method)."""

    def make(name: str, key: str) -> Subject:
        return Subject(bases(name), ZOO[name], EVERY[name, key])

    return make


def _pair(request: pytest.FixtureRequest, adopt: Callable[[str, str], Subject]) -> Subject:
    torch.manual_seed(0)
    return adopt(*request.param)


for _name in PAIRS:
    globals()[_name] = pytest.fixture(_pair, name=_name)


@pytest.fixture(scope="session")
def weights_of() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Copies of every parameter and buffer of a model without its adapters, by original name."""

    def of(model: nn.Module) -> dict[str, Tensor]:
        found = {}
        for key, value in model.state_dict().items():
            if ".adapters." not in f".{key}":
                found[key.replace("base.", "")] = value.detach().clone()
        return found

    return of


@pytest.fixture(scope="session")
def check_output() -> Callable[[Tensor, list[Tensor], Tensor], None]:
    """Judge a result by PyTorch's own: twice its error, and two roundings of the largest value."""

    def check(ours: Tensor, peers: list[Tensor], truth: Tensor) -> None:
        error, *others = ((t.double() - truth).abs().max() for t in (ours, *peers))
        baseline = max(others)
        allowed = 2 * baseline + 2 * torch.finfo(ours.dtype).eps * truth.abs().max()
        assert error <= allowed, f"{error:.3g} is above {allowed:.3g}"

    return check


@pytest.fixture(scope="session")
def derived() -> Callable[[Adapter, nn.Module], Terms]:
    """`formula`, for tests that look at weights."""
    return formula


@pytest.fixture(scope="session")
def layer_bound() -> Callable[[LoRA, nn.Module, Tensor], Tensor]:
    """`output_bound`, for tests that look at layers."""
    return output_bound


@pytest.fixture
def perceptron() -> nn.Module:
    """A perceptron of its own for a test."""
    return Perceptron().eval()


@pytest.fixture
def convnet() -> nn.Module:
    """A convolution net of its own for a test."""
    return ConvNet().eval()


@pytest.fixture
def unet() -> nn.Module:
    """A U-Net of its own for a test."""
    return UNet().eval()


@pytest.fixture
def whole_state(state_of: Callable) -> Callable[[nn.Module], object]:
    """More than `state_of`: buffers, modes and hooks too."""

    def of(model: nn.Module) -> object:
        return str(
            (
                state_of(model),
                [(name, id(b), b.tolist()) for name, b in model.named_buffers()],
                [(m.training, list(m._forward_hooks), list(m._forward_pre_hooks))
                 for m in model.modules()],
                [(host.mixture, host.wraps) for _, host in adapted_modules(model)],
            )
        )  # fmt: skip

    return of
