"""The shapes of the families that are compared with transformers: a row each, tiny.

A row is what the family's published models differ in: tied or not, heads of their own width, which
layers slide, what rotates. Sizes are small, windows shorter than the texts, caps as small beside
these scores and logits as the published ones are beside a real model's.
"""

from dataclasses import dataclass, field
from typing import Any

COLUMNS = ("logits", "gradients", "cache", "window", "NF4", "template", "adapter")
VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    title: str
    """in docs/models.md"""
    model: str
    """transformers' class"""
    templates: tuple[str, ...]
    """chat templates of tests/data/family_templates that its models come with"""
    changes: dict[str, Any] = field(default_factory=dict)
    """of its configuration, against `SIZES`"""
    wrapper: dict[str, Any] | None = None
    """of a multimodal model's configuration, whose text part the rest is about"""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those that it has a cell in."""
        slides = self.changes.get("sliding_window") is not None
        return tuple(column for column in COLUMNS if slides or column != "window")


def rope(kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
# the root of 40, by which they multiply embeddings, is another number in bfloat16
GEMMA: dict[str, Any] = {"hidden_size": 40, "head_dim": 16}
GEMMA2 = GEMMA | {"query_pre_attn_scalar": 24, "sliding_window": 6}
GEMMA3 = GEMMA2 | {
    "num_hidden_layers": 4,  # two that slide, one that does not, one more; it is five and one
    "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": rope("linear", factor=8.0) | {"rope_theta": 1e5},
        "sliding_attention": rope() | {"rope_theta": 50.0},
    },
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    """Of `pairs` turning pairs of channels; texts above 16 tokens have the long factors."""
    short, long = ([start + i / 3 for i in range(pairs)] for start in (1.0, 2.5))
    known = {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}
    return rope("longrope", short_factor=short, long_factor=long, factor=4.0, **known | more)


CASES: dict[str, Case] = {
    "llama2": Case("Llama 2", "LlamaForCausalLM", ("llama2",), {"num_key_value_heads": 4}),
    "llama3": Case(
        "Llama 3", "LlamaForCausalLM", ("llama3", "llama31"), {"rope_parameters": LLAMA3}
    ),
    "llama32": Case(
        "Llama 3.2 (tied)",
        "LlamaForCausalLM",
        ("llama31",),
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "mistral": Case("Mistral 7B", "MistralForCausalLM", ("mistral_v01",), {"sliding_window": 7}),
    "mistral-nemo": Case(
        "Mistral Nemo, Small",
        "MistralForCausalLM",
        ("mistral_nemo", "mistral_v03", "mistral_small"),
        {"sliding_window": None, "head_dim": 12},
    ),
    "qwen2": Case("Qwen 2, 2.5", "Qwen2ForCausalLM", ("qwen25",), {"tie_word_embeddings": True}),
    "qwen2-window": Case(
        "Qwen 2, sliding",
        "Qwen2ForCausalLM",
        ("qwen25",),
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": Case("Qwen 3", "Qwen3ForCausalLM", ("qwen3",), {"head_dim": 16}),
    "qwen3-moe": Case(
        "Qwen 3 MoE",
        "Qwen3MoeForCausalLM",
        ("qwen3",),
        {
            "head_dim": 16,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "experts_implementation": "eager",  # transformers' others have no float64
        },
    ),
    "gemma": Case("Gemma", "GemmaForCausalLM", ("gemma",), GEMMA | {"num_key_value_heads": 1}),
    "gemma2": Case(
        "Gemma 2",
        "Gemma2ForCausalLM",
        ("gemma",),
        # caps as small beside these scores and logits as 50 and 30 are beside a real model's
        GEMMA2
        | {"num_hidden_layers": 3, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": Case("Gemma 3 (text)", "Gemma3ForCausalLM", ("gemma3",), GEMMA3),
    "gemma3-wrapped": Case(
        "Gemma 3 (text of the multimodal)",
        "Gemma3ForConditionalGeneration",
        ("gemma3",),
        GEMMA3 | {"num_hidden_layers": 3, "layer_types": GEMMA3["layer_types"][1:]},
        {
            "vision_config": TOWER,
            "mm_tokens_per_image": 4,
            "image_token_index": 200,
            "boi_token_index": 198,
            "eoi_token_index": 199,
        },
    ),
    "mistral3-wrapped": Case(
        "Mistral Small 3 (text of the multimodal)",
        "Mistral3ForConditionalGeneration",
        ("mistral_small",),
        {"sliding_window": None, "head_dim": 12, "model_type": "mistral"},
        {
            "vision_config": TOWER | {"model_type": "pixtral"},
            "image_token_index": 200,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": Case("Phi-3 mini", "Phi3ForCausalLM", ("phi3",), {"sliding_window": 9}),
    "phi35": Case(
        "Phi-3.5, 4",
        "Phi3ForCausalLM",
        ("phi3", "phi4"),
        {"rope_parameters": longrope(4), "original_max_position_embeddings": 16},
    ),
    "phi4-mini": Case(
        "Phi-4 mini",
        "Phi3ForCausalLM",
        ("phi4_mini",),
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": longrope(6, partial_rotary_factor=0.75),
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2": Case("SmolLM 2", "LlamaForCausalLM", ("smollm2",), {"tie_word_embeddings": True}),
    "smollm3": Case(
        "SmolLM 3",
        "SmolLM3ForCausalLM",
        ("smollm3",),
        {"num_hidden_layers": 4, "use_sliding_window": False},  # the fourth does not rotate
    ),
    "smollm3-window": Case(
        "SmolLM 3, sliding",
        "SmolLM3ForCausalLM",
        ("smollm3",),
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
    "olmo2": Case("OLMo 2", "Olmo2ForCausalLM", ("olmo2",)),
    "granite": Case(
        "Granite 3",
        "GraniteForCausalLM",
        ("granite3",),
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.5,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
            "tie_word_embeddings": True,
        },
    ),
}
