"""`lora-core pretrain`: plain text in, a tokenizer and a small language model out.

The model is a Llama-shaped decoder with tied embeddings, trained from scratch by the same loop as
every other run (`lora_core.train`), in float32 weights with narrower products if wanted, and saved
in bfloat16. The figure that is reported, bits per byte of held-out text, is taken from the saved
weights: -log2 P of all held-out tokens by the bytes of their text. Windows overlap by half, so
that every token but the first ones is judged with half a window or more before it.

`recipe.json` beside the model says everything that was chosen, what it was made from and what came
out; `--recipe` repeats it.
"""

import argparse
import dataclasses
import json
import platform
import shlex
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.cli.flags import add_dataclass_flags, given

if TYPE_CHECKING:
    from lora_core.data.corpus import Corpus
    from lora_core.data.tokenizer import Tokenizer
    from lora_core.models.config import ModelConfig
    from lora_core.train import TrainConfig, TrainResult

HELP = "train a small model and its tokenizer from plain text"
EXAMPLE = (
    "lora-core pretrain --out runs/mine --text book.txt notes.txt --vocab-size 1024 --steps 500"
)

_TRAIN = {
    "lr": 3e-3,
    "batch_size": 8,
    "accumulate": 1,
    "weight_decay": 0.1,
    "beta2": 0.98,
    "warmup": 0.02,
    "schedule": "linear",
    "keep_best": False,
}
_FLAGLESS = ("out", "resume", "patience", "keep_best", "label_smoothing", "progress")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The model's shape and the share of the text held out; checked when made."""

    vocab_size: int = 4096
    """tokens, marks and bytes included"""
    hidden: int = 256
    """width of the residual stream"""
    intermediate: int = 704
    """width of the feed-forward layers"""
    layers: int = 5
    """decoder layers"""
    heads: int = 4
    """query heads"""
    kv_heads: int = 2
    """key and value heads"""
    context: int = 256
    """tokens in a training window, and the longest sequence the model has seen"""
    held_out: float = 5.0
    """share of the documents that is kept from training, in percent"""

    def __post_init__(self) -> None:
        if self.context < 8:
            raise ValueError(f"context must be at least 8 tokens; got {self.context}")
        if not 0 < self.held_out < 100:
            raise ValueError(f"held_out must be a percentage above 0; got {self.held_out}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    from lora_core.train import TrainConfig

    parser.add_argument("--out", required=True, help="folder for the model and the training state")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="UTF-8 files [Python's standard library]"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of a tokenizer to use as it is")
    parser.add_argument("--recipe", metavar="FILE", help="recipe.json to repeat; flags come first")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--json", action="store_true", help="print the recipe with the results")
    add_dataclass_flags(parser, PretrainConfig, title="model and text")
    add_dataclass_flags(parser, TrainConfig, skip=_FLAGLESS, title="training")


def run(args: argparse.Namespace) -> int:
    """Make the tokenizer, train the model, measure it, write the folder."""
    from lora_core.train import TrainConfig

    out = Path(args.out)
    recipe = _read_recipe(args.recipe)
    shape = PretrainConfig(**recipe.get("model", {}) | given(args, PretrainConfig))
    options = _TRAIN | recipe.get("train", {}) | given(args, TrainConfig)
    config = TrainConfig(**options, out=out / "training", resume=args.resume)
    corpus = read_corpus(args.text, shape.held_out)
    tok = _tokenizer(corpus, shape, args.tokenizer, out, args.resume)
    outcome = pretrain(corpus, tok, shape, config, out)
    if outcome is None:
        return 130
    (out / "recipe.json").write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(outcome, indent=2))
    else:
        _print(out, outcome["result"])
    return 0


def read_corpus(text: list[str] | None, percent: float) -> "Corpus":
    """The files given, or the standard library."""
    from lora_core.data.corpus import read_text_files
    from lora_core.data.stdlib import read_corpus

    return read_corpus(percent=percent) if text is None else read_text_files(text, percent)


def streams(corpus: "Corpus", tok: "Tokenizer") -> tuple["array[int]", "array[int]"]:
    """The training and the held-out token stream, each with an end token before the first text."""
    from lora_core.data.text import encode_documents

    first = array("i", [tok.eos_id or 0])
    train, held_out = (encode_documents(texts, tok) for texts in (corpus.train, corpus.held_out))
    return first + train, first + held_out


def pretrain(
    corpus: "Corpus", tok: "Tokenizer", shape: PretrainConfig, config: "TrainConfig", out: Path
) -> dict[str, Any] | None:
    """Train, save in bfloat16, measure what was saved.

    Args:
        corpus: the documents.
        tok: their tokenizer.
        shape: the model.
        config: the run; its `out` holds the training state.
        out: folder that gets the model.

    Returns:
        The recipe with its results; None if the run was interrupted (`--resume` continues it).
    """
    import torch

    from lora_core.data.text import TextWindows
    from lora_core.models.decoder import CausalLM
    from lora_core.train import train

    ids, held_out = streams(corpus, tok)
    facts = {
        "corpus_sha256": corpus.sha256,
        "train_documents": len(corpus.train),
        "train_bytes": sum(len(text.encode()) for text in corpus.train),
        "train_tokens": len(ids) - 1,
        "held_out_bytes": corpus.held_out_bytes,
        "held_out_tokens": len(held_out) - 1,
        "held_out": corpus.held_out_names,
    }
    torch.manual_seed(config.seed)
    model = CausalLM(model_config(shape, tok))
    model.init_weights()
    rows = TextWindows(ids, shape.context)
    held_rows = TextWindows(held_out, shape.context)
    result = train(
        model, rows, config, eval_dataset=held_rows, facts=facts | dataclasses.asdict(shape)
    )
    if result.interrupted:
        return None
    _save(model, tok, out)
    measured = {
        "parameters": sum(p.numel() for p in model.parameters()),
        **measure(out, held_out, corpus.held_out_bytes, shape.context),
        "train_loss": _recent_loss(result),
        "steps": result.steps,
        "tokens_seen": result.tokens,
        "train_seconds": round(sum(r["seconds"] for r in result.history)),
    }
    words = [word for word in sys.argv[1:] if word != "--resume"]  # what made it, in one go
    return {
        "command": shlex.join(["lora-core", *words]),
        "model": dataclasses.asdict(shape),
        "train": _chosen(config),
        "data": facts,
        "result": measured,
        "versions": _versions(),
    }


def model_config(shape: PretrainConfig, tok: "Tokenizer") -> "ModelConfig":
    """The decoder's configuration: tied embeddings, no biases, the tokenizer's special ids."""
    from lora_core.models.config import ModelConfig

    stops = tok.eos_ids
    return ModelConfig(
        vocab_size=tok.vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tuple(stops) if len(stops) > 1 else stops[0],
        pad_token_id=tok.pad_id,
    )


def measure(folder: Path, held_out: "array[int]", n_bytes: int, context: int) -> dict[str, float]:
    """Bits per byte and loss of a saved model, weights as saved, products in float32.

    Args:
        folder: the model.
        held_out: token stream, its first token not judged.
        n_bytes: UTF-8 bytes of the text.
        context: tokens in a window; windows overlap by half.

    Returns:
        `held_out_bits_per_byte`, `held_out_loss` (nats a token), `held_out_accuracy`.
    """
    from lora_core.checkpoint.folder import load_model
    from lora_core.data.corpus import overlapping_rows
    from lora_core.evaluate import perplexity

    model = load_model(folder, dtype="float32")
    rows = overlapping_rows(held_out, context)
    found = perplexity(model, rows, graded_bytes=n_bytes)
    assert found.bits_per_byte is not None  # the bytes were given
    return {
        "held_out_bits_per_byte": round(found.bits_per_byte, 4),
        "held_out_loss": round(found.loss, 4),
        "held_out_accuracy": round(found.accuracy, 4),
    }


def _tokenizer(
    corpus: "Corpus", shape: PretrainConfig, given_folder: str | None, out: Path, resume: bool
) -> "Tokenizer":
    """The tokenizer given, that of the run being continued, or a new one."""
    from lora_core.data import load_tokenizer
    from lora_core.data.corpus import train_tokenizer

    mine = out / "training" / "tokenizer"
    folder = Path(given_folder) if given_folder else mine if resume and mine.is_dir() else None
    if folder is None:
        print(f"tokenizer: {shape.vocab_size} tokens from {len(corpus.train)} texts", flush=True)
        tok = train_tokenizer(corpus.train, shape.vocab_size, shape.context)
    else:
        tok = load_tokenizer(folder)
    _save_tokenizer(tok, mine)
    return tok


def _save_tokenizer(tok: "Tokenizer", folder: Path) -> None:
    """The tokenizer's files, and the tokens that end a generation."""
    tok.save(folder)
    ends = {"eos_token_id": tok.eos_ids, "pad_token_id": tok.pad_id}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n")


def _save(model: Any, tok: "Tokenizer", out: Path) -> None:
    from lora_core.checkpoint.folder import save_model

    save_model(model, out, dtype="bfloat16")
    _save_tokenizer(tok, out)


def _recent_loss(result: "TrainResult") -> float:
    """Mean training loss of the last twentieth of the run, nats a token."""
    last = result.history[-max(len(result.history) // 20, 1) :]
    return round(sum(record["loss"] for record in last) / len(last), 4)


def _chosen(config: "TrainConfig") -> dict[str, Any]:
    """The training options, as `--recipe` reads them."""
    return {k: v for k, v in config.to_dict().items() if k not in ("out", "resume", "progress")}


def _read_recipe(path: str | None) -> dict[str, Any]:
    from lora_core.train import TrainConfig

    if path is None:
        return {}
    try:
        recipe = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no recipe: {error}") from None
    for key, known in (("model", PretrainConfig), ("train", TrainConfig)):
        section = recipe.get(key) if isinstance(recipe, dict) else None
        if not isinstance(section, dict):
            raise ValueError(f'{path} is no recipe: it has no object "{key}"')
        names = {f.name for f in dataclasses.fields(known)}
        if unknown := sorted(set(section) - names):
            raise ValueError(f'{path}: "{key}" has unknown entries {", ".join(unknown)}')
    return dict(recipe)


def _versions() -> dict[str, str]:
    from lora_core.train.report import versions

    return versions() | {"machine": f"{platform.system()} {platform.machine()}"}


def _print(out: Path, result: dict[str, Any]) -> None:
    print(
        f"{out}: {result['parameters']:,} parameters, {result['steps']} steps, "
        f"{result['tokens_seen']:,} tokens, {result['train_seconds']} s; "
        f"held out: {result['held_out_bits_per_byte']} bits per byte, "
        f"{result['held_out_accuracy']:.1%} of the tokens right"
    )
