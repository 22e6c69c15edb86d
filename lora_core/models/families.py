"""What differs between families of decoders, as data.

config.json says how large a model is. It does not say everything: that Qwen 2 has biases on q, k
and v, that Gemma multiplies by 1 + w, or that OLMo 2 puts its norms behind the layers, is known by
the family's name alone. Here that knowledge is one row a family: which keys of config.json it
reads, which values an absent key has, and which of the decoder's parts it uses. A key that a family
does not read is left out, as transformers' configuration class of that family leaves it out.

A family that differs in these ways alone is a further row (`register_family`, docs/extending.md).
One that needs a new part gets a new field here and a branch on it in attention.py or decoder.py.

Where the others have a file a family (transformers: some 500 lines each, made from one another) or
a table of every model's sizes (litgpt), the differences are side by side, to be read in one place.

Ref: Touvron et al. 2023 (Llama), arXiv:2302.13971; Jiang et al. 2023 (Mistral 7B),
arXiv:2310.06825; Qwen Team 2024 and 2025, arXiv:2412.15115 and arXiv:2505.09388; Gemma Team 2024
and 2025, arXiv:2403.08295, arXiv:2408.00118 and arXiv:2503.19786; Abdin et al. 2024 (Phi-3),
arXiv:2404.14219; OLMo Team 2024 (OLMo 2), arXiv:2501.00656.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = (FULL, SLIDING)

# what may lie before attention, behind it, before the feed-forward layer and behind it
PLACES: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
NORMS = ("llama", "gemma", "wide")
QK_NORMS = (None, "head", "width")

Values = Mapping[str, Any]


def all_full(values: Values) -> list[str]:
    """Every layer sees all earlier tokens."""
    return [FULL] * values["num_hidden_layers"]


def all_alike(values: Values) -> list[str]:
    """Every layer slides, if there is a window (Mistral 7B v0.1, Phi-3)."""
    kind = FULL if values.get("sliding_window") is None else SLIDING
    return [kind] * values["num_hidden_layers"]


def one_in(usual: int, key: str | None = None) -> Callable[[Values], list[str]]:
    """All but each n-th layer slide; n is usual, or what a key of config.json says (Gemma)."""

    def pattern(values: Values) -> list[str]:
        n = (values.get(key) if key else None) or usual
        return [FULL if (i + 1) % n == 0 else SLIDING for i in range(values["num_hidden_layers"])]

    return pattern


def upper_layers(values: Values) -> list[str]:
    """Layers from `max_window_layers` on slide, if there is a window (Qwen)."""
    first = values.get("max_window_layers", 28)
    window = values.get("sliding_window")
    return [
        FULL if window is None or i < first else SLIDING for i in range(values["num_hidden_layers"])
    ]


def unrotated_layers(values: Values) -> list[str]:
    """Layers without rotary positions slide, if there is a window (SmolLM 3)."""
    window = values.get("sliding_window")
    rotated = values.get("no_rope_layers") or [1] * values["num_hidden_layers"]
    return [FULL if window is None or turns else SLIDING for turns in rotated]


@dataclass(frozen=True)
class Family:
    """One family of decoders: what its config.json means and which parts it is made of.

    Raises:
        ValueError: a part that does not exist.
    """

    architecture: str
    """Its name in `architectures`."""
    keys: tuple[str, ...] = ()
    """Fields of ModelConfig that its config.json may set, beyond those of every family."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of absent keys, where they differ from ModelConfig's."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """{field: key in config.json}, where they differ."""
    also: Mapping[str, str] = field(default_factory=dict)
    """{field: a further key that is read in its place where there is one}."""
    refused: tuple[str, ...] = ()
    """Keys that would make it another model: refused unless absent, null, false or 0."""
    optional_window: bool = False
    """Whether `sliding_window` counts only with `use_sliding_window`."""
    layer_types: Callable[[Values], list[str]] = all_full
    """Which layers slide, where config.json does not list them."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies, where config.json names none."""
    local_rope_theta: float | None = None
    """The same of sliding layers, which then have frequencies of their own; None: they do not."""
    rope_context: int | None = None
    """`original_max_position_embeddings`, where config.json names none; None: the scaling says."""
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    """Names that its older files have for types of rotary embedding."""
    partial_rotary: bool = False
    """Whether `partial_rotary_factor` may leave channels of a head unturned."""
    activations: Mapping[str, str] = field(default_factory=dict)
    """Activations whose name means another one here."""
    qkv_bias: bool | None = None
    """Whether q, k and v have biases and o has none; None: `attention_bias` says, for all four."""
    qk_norm: str | None = None
    """Norm of queries and keys before rotation: over each "head", over the whole "width"; None."""
    norm: str = "llama"
    """How the norm's weight is applied: "llama", "gemma" or "wide" (decoder.RMSNorm)."""
    placement: str = "pre"
    """Where the norms are: a key of `PLACES`."""
    fused_projections: bool = False
    """Whether q, k, v are one matrix, and gate and up another."""
    scaled_embedding: bool = False
    """Whether embeddings are multiplied by sqrt(hidden_size)."""

    def __post_init__(self) -> None:
        for name, known in (("norm", NORMS), ("placement", tuple(PLACES)), ("qk_norm", QK_NORMS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {value}")


_WINDOW = ("sliding_window", "layer_types")
_EXPERTS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "router_aux_loss_coef",
    "output_router_logits",
)
_QWEN: dict[str, Any] = {
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 32768,
}
_GEMMA: dict[str, Any] = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_GEMMA2: dict[str, Any] = _GEMMA | {"num_key_value_heads": 4, "query_pre_attn_scalar": 256}

# model_type -> family
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", keys=("attention_bias", "mlp_bias")),
    "mistral": Family(
        "MistralForCausalLM",
        keys=("sliding_window",),
        defaults={
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
        },
        layer_types=all_alike,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        keys=_WINDOW,
        defaults=_QWEN | {"num_key_value_heads": 32, "sliding_window": 4096},
        optional_window=True,
        layer_types=upper_layers,
        qkv_bias=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        keys=(*_WINDOW, "attention_bias"),
        defaults=_QWEN | {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
        optional_window=True,
        layer_types=upper_layers,
        qk_norm="head",
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        keys=("sliding_window", "attention_bias", *_EXPERTS),
        defaults=_QWEN
        | {
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        also={"num_experts": "num_local_experts"},  # what transformers 5 writes
        optional_window=True,
        layer_types=all_alike,
        qk_norm="head",
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        keys=("attention_bias",),
        defaults=_GEMMA | {"num_key_value_heads": 16},
        refused=("use_bidirectional_attention",),
        activations={"gelu": "gelu_pytorch_tanh"},  # the first files say gelu and mean tanh's form
        norm="gemma",
        scaled_embedding=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        keys=(
            *_WINDOW,
            "attention_bias",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        ),
        defaults=_GEMMA2
        | {
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        renamed={"hidden_act": "hidden_activation"},
        refused=("use_bidirectional_attention",),
        layer_types=one_in(2),
        norm="gemma",
        placement="both",
        scaled_embedding=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        keys=(*_WINDOW, "attention_bias", "query_pre_attn_scalar", "final_logit_softcapping"),
        defaults=_GEMMA2 | {"sliding_window": 4096, "max_position_embeddings": 131072},
        renamed={"hidden_act": "hidden_activation"},
        # transformers reads a cap of the scores here and does not apply it
        refused=("use_bidirectional_attention", "attn_logit_softcapping"),
        layer_types=one_in(6, "sliding_window_pattern"),
        rope_theta=1e6,
        local_rope_theta=1e4,
        qk_norm="head",
        norm="gemma",
        placement="both",
        scaled_embedding=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        keys=("sliding_window",),
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "pad_token_id": 32000,
            "eos_token_id": 32000,
        },
        refused=("resid_pdrop",),
        layer_types=all_alike,
        rope_context=4096,
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        partial_rotary=True,
        fused_projections=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        keys=(*_WINDOW, "attention_bias", "mlp_bias", "no_rope_layers"),
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "pad_token_id": 128004,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
        optional_window=True,
        layer_types=unrotated_layers,
        rope_theta=2e6,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        keys=("attention_bias",),
        defaults={
            "rms_norm_eps": 1e-5,
            "pad_token_id": 1,
            "bos_token_id": None,
            "eos_token_id": 50279,
        },
        refused=("clip_qkv",),
        qk_norm="width",
        norm="wide",
        placement="post",
    ),
    "granite": Family(
        "GraniteForCausalLM",
        keys=(
            "attention_bias",
            "mlp_bias",
            "embedding_multiplier",
            "attention_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ),
        defaults={"attention_multiplier": 1.0},
    ),
}

# model_type of a multimodal model -> (its architecture, defaults that its text part's file omits);
# the text part is one of the families
WRAPPERS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        MappingProxyType(
            {
                "model_type": "gemma3_text",
                "vocab_size": 262208,
                "hidden_size": 2304,
                "intermediate_size": 9216,
                "num_hidden_layers": 26,
                "num_attention_heads": 8,
            }
        ),
    ),
    "mistral3": ("Mistral3ForConditionalGeneration", MappingProxyType({})),
}


def register_family(model_type: str, family: Family) -> None:
    """Make a further family known to `ModelConfig`, `load_model` and everything behind them.

    Args:
        model_type: its name in config.json.
        family: what it is made of.

    Raises:
        ValueError: the name, or the architecture's, is taken.
    """
    taken = {known.architecture: name for name, known in FAMILIES.items()}
    if model_type in FAMILIES or model_type in WRAPPERS:
        raise ValueError(f"a family {model_type!r} is known already: choose another model_type")
    if family.architecture in taken:
        raise ValueError(
            f"architecture {family.architecture!r} is {taken[family.architecture]!r} already"
        )
    FAMILIES[model_type] = family
