"""Is the shipped base model better than counting? Bits per byte against a Kneser–Ney 5-gram.

Both models are trained on the same tokens (the recipe's training text under the shipped tokenizer)
and score the same tokens of the held-out modules, `<|endoftext|>` between documents included. Bits
per byte is the sum of -log2 P over those tokens by the number of UTF-8 bytes of the held-out text;
it does not depend on the vocabulary, so models with other tokenizers can be compared with it.

    python -m benchmarks.base_model                      # the shipped model
    python -m benchmarks.base_model --model DIR --record  # another; note the figure in its recipe

The count model is interpolated modified Kneser–Ney: raw counts at the highest order, continuation
counts below it, three discounts an order estimated from the counts of counts, unigrams
interpolated with the uniform distribution. Its probabilities are checked to sum to one before
anything is compared.

Ref: Chen and Goodman, An empirical study of smoothing techniques for language modeling (1998),
section 3, equations 24 to 26; Kneser and Ney (1995).
"""

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Level:
    """One order of the model: its n-grams and what each context leaves to the order below."""

    keys: Ints  # (G,) sorted; context id · V + token
    discounted: Floats  # (G,) max(c - D(c), 0) / sum of the context's counts
    left_over: Floats  # (C,) mass that each context of n - 1 tokens leaves to the order below


def _find(keys: Ints, wanted: Ints, known: npt.NDArray[np.bool_]) -> Ints:
    """Index of each wanted key, -1 where it is absent or its context was."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(known & (keys[at] == wanted), at, -1)


def discounts(counts: Ints) -> Floats:
    """D0 = 0, D1, D2, D3+ from the counts of counts (Chen and Goodman, equation 26).

    Where a small text has none of the counts needed, the one discount Y = n1 / (n1 + 2 n2) stands
    for all three.
    """
    n = [int((counts == i).sum()) for i in range(5)]
    y = n[1] / max(n[1] + 2 * n[2], 1)
    if min(n[1:]) == 0:
        return np.array([0.0, y, y, y])
    modified = [0.0] + [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
    return np.clip(np.array(modified), 0.0, [0.0, 1.0, 2.0, 3.0])


class KneserNey:
    """Interpolated modified Kneser–Ney over token ids.

    Args:
        tokens: the training stream, token ids in 0 … vocabulary - 1.
        vocabulary: number of token ids.
        order: longest n-gram.
    """

    def __init__(self, tokens: Ints, vocabulary: int, order: int = 5) -> None:
        if order < 2:
            raise ValueError(f"order must be 2 or more; got {order}")
        if len(tokens) <= order:
            raise ValueError(f"{len(tokens)} tokens are too few for n-grams of {order}")
        self.vocabulary, self.order = vocabulary, order
        tokens = tokens.astype(np.int64)
        keys: list[Ints] = []
        suffixes: list[Ints] = []
        ids = np.zeros(len(tokens), np.int64)  # of the n-gram ending at each place; n = 0: all one
        counts: Ints = np.zeros(0, np.int64)
        for n in range(1, order + 1):
            # an n-gram is its context's id and its last token; the first n - 1 places have none
            key = np.roll(ids, 1)[n - 1 :] * vocabulary + tokens[n - 1 :]
            unique, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
            suffix = np.zeros(len(unique), np.int64)
            suffix[inverse] = ids[n - 1 :]
            keys.append(unique)
            suffixes.append(suffix)
            ids = np.concatenate([np.zeros(n - 1, np.int64), inverse])
        self._levels = self._smooth(keys, suffixes, counts)

    def _smooth(self, keys: list[Ints], suffixes: list[Ints], counts: Ints) -> list[Level]:
        """Turn counts into discounted shares; below the highest order, continuation counts."""
        levels = []
        for n in range(self.order):
            count = counts  # of the highest order
            if n + 1 < self.order:  # below it: how many different tokens stand before the n-gram
                count = np.bincount(suffixes[n + 1], minlength=len(keys[n]))
            context = keys[n] // self.vocabulary
            contexts = len(keys[n - 1]) if n else 1
            discount = discounts(count)[np.minimum(count, 3)]
            total = np.maximum(np.bincount(context, count, contexts), 1e-300)
            kept = np.maximum(count - discount, 0.0)
            left = 1.0 - np.bincount(context, kept, contexts) / total
            levels.append(Level(keys[n], kept / total[context], left))
        return levels

    def probabilities(self, tokens: Ints) -> Floats:
        """P(token | the order - 1 tokens before it) at every place but the first.

        Args:
            tokens: (T,) the stream to score; near its start the history is what there is.

        Returns:
            (T - 1,) probabilities.
        """
        tokens = tokens.astype(np.int64)
        result = np.full(len(tokens), 1.0 / self.vocabulary)
        history = np.zeros(len(tokens), np.int64)  # the empty context is context 0 of order 1
        for level in self._levels:
            known = history >= 0
            context = np.where(known, history, 0)
            found = _find(level.keys, context * self.vocabulary + tokens, known)
            share = np.where(found >= 0, level.discounted[found], 0.0)
            result = np.where(known, share + level.left_over[context] * result, result)
            history = np.concatenate([[-1], found[:-1]])
        return result[1:]


def check_sums(model: KneserNey, tokens: Ints, places: int = 3) -> None:
    """Refuse a model whose probabilities do not sum to one after some of the histories seen."""
    for at in np.linspace(model.order, len(tokens) - 1, places, dtype=np.int64):
        history = tokens[at - model.order + 1 : at]
        total = sum(
            model.probabilities(np.append(history, word))[-1] for word in range(model.vocabulary)
        )
        if abs(total - 1) > 1e-9:
            raise AssertionError(f"probabilities after {history} sum to {total}")


def bits_per_byte(probabilities: Floats, n_bytes: int) -> float:
    """-sum of log2 P by bytes."""
    return float(-np.log2(probabilities).sum() / n_bytes)


def compare(folder: Path, percent: float, order: int, *, check: bool = True) -> dict[str, Any]:
    """Both models' bits per byte on the same tokens.

    Args:
        folder: the model, with its tokenizer and recipe.json.
        percent: share of the modules held out.
        order: of the count model.
        check: whether the count model's sums are checked first.
    """
    from lora_core.cli.pretrain import measure, read_corpus, streams
    from lora_core.data import load_tokenizer

    recipe = json.loads((folder / "recipe.json").read_text())
    corpus, tok = read_corpus(None, percent), load_tokenizer(folder)
    train, held_out = streams(corpus, tok)
    counted = KneserNey(np.asarray(train), tok.vocab_size, order)
    tokens = np.asarray(held_out, np.int64)
    if check:
        check_sums(counted, tokens)
    baseline = bits_per_byte(counted.probabilities(tokens), corpus.held_out_bytes)
    context = recipe["model"]["context"]
    ours = measure(folder, held_out, corpus.held_out_bytes, context)["held_out_bits_per_byte"]
    return {
        "same_text_as_recipe": corpus.sha256 == recipe["data"]["corpus_sha256"],
        "train_tokens": len(train) - 1,
        "held_out_tokens": len(held_out) - 1,
        "held_out_bytes": corpus.held_out_bytes,
        f"kneser_ney_{order}gram_bits_per_byte": round(baseline, 4),
        "model_bits_per_byte": ours,
        "below": round(1 - ours / baseline, 4),
    }


def main() -> None:
    """Compare, print, and note the figures in the recipe if asked to."""
    from lora_core.checkpoint import base_model_path

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--model", help="folder that `lora-core pretrain` wrote [the shipped model]"
    )
    parser.add_argument("--order", type=int, default=5, help="longest n-gram [5]")
    parser.add_argument("--record", action="store_true", help="note the figures in recipe.json")
    args = parser.parse_args()
    folder = Path(args.model) if args.model else base_model_path()
    recipe = json.loads((folder / "recipe.json").read_text())
    began = time.perf_counter()
    found = compare(folder, recipe["model"]["held_out"], args.order)
    machine = f"{platform.system()} {platform.machine()}"
    print(f"{machine}, Python {platform.python_version()}, numpy {np.__version__}")
    if not found["same_text_as_recipe"]:
        print(
            f"this Python's library is not the one the model was trained on (Python "
            f"{recipe['versions']['python']}): modules held out there may differ from those here"
        )
    for name, value in found.items():
        print(f"{name:<36} {value}")
    print(f"{'seconds':<36} {time.perf_counter() - began:.0f}")
    if args.record:
        recipe["baseline"] = found
        (folder / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")


if __name__ == "__main__":
    main()
