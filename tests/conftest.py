"""Fixtures and settings that every test shares."""

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

# one thread a process: the suite runs one process a core, and the tensors are small
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton's kernels run in its interpreter; it decides when a kernel is defined, so before any import
os.environ["TRITON_INTERPRET"] = "1"
# nothing may reach for a model hub
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

torch.set_num_threads(1)

FULL = os.environ.get("LORA_TEST_FULL") == "1"
_common = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": not FULL}
settings.register_profile("quick", max_examples=15, **_common)
settings.register_profile("full", max_examples=200, **_common)
settings.load_profile("full" if FULL else "quick")


@pytest.fixture(scope="session")
def full_run() -> bool:
    """Whether this is `make test-all`: full counts instead of the quick ones."""
    return FULL


@pytest.fixture(scope="session")
def oracle() -> Callable[[str], ModuleType]:
    """Import a peer library; absent it skips, except where LORA_REQUIRE_ORACLES=1 (CI)."""

    def load(name: str) -> ModuleType:
        if os.environ.get("LORA_REQUIRE_ORACLES") == "1":
            return importlib.import_module(name)
        return pytest.importorskip(name)

    return load


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty*` returns with NaN (integers: garbage), so unwritten elements show."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def empty(*args: object, **kwargs: object) -> torch.Tensor:
            out = make(*args, **kwargs)
            if out.device.type != "meta":
                out.fill_(float("nan") if out.is_floating_point() else 0x5A)
            return out

        return empty

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(scope="session")
def shake() -> Callable[..., nn.Module]:
    """Give every adapter parameter in a model numbers that matter; gives the model back."""
    from lora_core.adapters import adapted_modules

    def fill(model: nn.Module, scale: float = 0.3) -> nn.Module:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, host in adapted_modules(model):
                for parameter in host.adapters.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise, alpha=scale)
        return model

    return fill


class EveryForm(nn.Module):
    """A layer of every kind whose low-rank pair has a shape of its own, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.fused = nn.Linear(6, 15)
        self.mix = nn.Linear(15, 8, bias=False)
        self.conv = nn.Conv2d(4, 6, (3, 2))
        self.grouped = nn.Conv1d(8, 12, 3, groups=4)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.mix(self.fused(self.embed(ids))))


@pytest.fixture
def every_form() -> nn.Module:
    return EveryForm()


@pytest.fixture(scope="session")
def small_decoder() -> Callable[..., nn.Module]:
    """Make the library's decoder, uninitialised: 1 layer of 2 heads, hidden size 16, and options.

    32 between, vocabulary 40.
    """
    from lora_core.models import CausalLM, ModelConfig

    usual = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return lambda **options: CausalLM(ModelConfig(**{**usual, **options}))


@pytest.fixture(scope="session")
def load_benchmark() -> Callable[[str], ModuleType]:
    """Import a benchmark: a test run leaves the repository's root off the path."""
    root = str(Path(__file__).parents[1])

    def load(name: str) -> ModuleType:
        sys.path.insert(0, root)
        try:
            return importlib.import_module(f"benchmarks.{name}")
        finally:
            sys.path.remove(root)

    return load


CHATML_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real byte-level BPE tokenizer.json (vocabulary of 400) and ChatML's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=CHATML_SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([torch.nn.Linear.__doc__, json.__doc__, os.__doc__], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


ENCODER_WORDS = [
    *("[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "cat", "dog", "sat", "ran", "on", "a", "mat"),
    *("who", "where", "?", ".", "rome", "oslo", "in", "is", "far", "##s", "##er"),
]


@pytest.fixture(scope="session")
def encoder_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT-like tokenizer of 23 word pieces, which frames texts as [CLS] a [SEP] b [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("encoder_tokenizer")
    vocabulary = {word: index for index, word in enumerate(ENCODER_WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "[UNK]"}))
    return folder


@pytest.fixture(scope="session")
def small_peer(oracle: Callable) -> Callable[..., nn.Module]:
    """Make a random language model of transformers': "llama" or "gpt2", and what is not usual.

    Hidden size 32, 2 layers, 4 heads (llama: 48 between, over 2 key/value heads), vocabulary 64.
    """
    usual: dict[str, dict[str, Any]] = {
        "llama": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    }
    ends = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None}

    def make(family: str, **options: Any) -> nn.Module:
        transformers = oracle("transformers")
        sizes = ends | usual[family] | options
        if family == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()

    return make


@pytest.fixture(scope="session")
def llama_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_folder: Path,
    small_peer: Callable[..., Any],
) -> Path:
    """A sharded folder that transformers' LlamaForCausalLM saved: random weights, real tokenizer.

    Hidden size 64, 3 layers, 4 heads of 16 over 2 key/value heads, vocabulary 400, float32.
    """
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    model = small_peer(
        "llama",
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=0,
    )
    model.save_pretrained(folder, max_shard_size="150KB")
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


SPECIALS = {
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
    "xlm-roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>"),
}


def encoder_tokenizer(family: str) -> Any:
    """WordPiece for BERT, byte-level BPE for RoBERTa, Unigram with "▁" for XLM-R."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    specials = list(SPECIALS[family])
    options: dict[str, Any] = {"special_tokens": specials, "show_progress": False}
    if family == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=300, **options)
    elif family == "roberta":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, **options)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", **options)
    texts = [torch.nn.Linear.__doc__, json.__doc__, os.__doc__, "naïve café, 日本語 😀"]
    tokenizer.train_from_iterator(texts, trainer)
    start, end = ("[CLS]", "[SEP]") if family == "bert" else ("<s>", "</s>")
    around = [(mark, tokenizer.token_to_id(mark)) for mark in (start, end)]
    if family == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(
            around[1], around[0], trim_offsets=True, add_prefix_space=False
        )
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}", pair=f"{start} $A {end} $B {end}", special_tokens=around
        )
    return tokenizer


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with an encoder of random weights and its tokenizer: bert, roberta, xlm-roberta.

    Hidden size 32, 3 layers, 4 heads, 36 tokens of text and 2 special ones; no head. Cosines of
    its tokens spread: norms are neutral.
    """
    from lora_core.checkpoint import save_model
    from lora_core.models import EncoderConfig, build_model

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family in made:
            return made[family]
        folder = made[family] = tmp_path_factory.mktemp(family)
        tokenizer = encoder_tokenizer(family)
        names = ("pad", "unk", "cls", "sep", "mask") if family == "bert" else ()
        names = names or ("cls", "pad", "sep", "unk", "mask")
        kind = "RobertaTokenizer" if family == "roberta" else "PreTrainedTokenizerFast"
        config: dict[str, Any] = {"tokenizer_class": kind, "model_max_length": 38}
        marks = zip(names, SPECIALS[family], strict=True)
        config |= {f"{name}_token": mark for name, mark in marks}
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
        model = build_model(
            EncoderConfig(
                vocab_size=tokenizer.get_vocab_size(),
                num_hidden_layers=3,
                max_position_embeddings=40,
                model_type=family,
                pad_token_id=SPECIALS[family].index("[PAD]" if family == "bert" else "<pad>"),
                head="none",
                **sizes,
            )
        )
        model.init_weights(0.2, torch.Generator().manual_seed(5))
        save_model(model, folder)
        return folder

    return make
