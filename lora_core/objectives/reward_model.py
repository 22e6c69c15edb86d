"""A trained reward model in use: answers in, scores out.

Where a policy is trained on the base that the reward adapter belongs to, in the same precision, no
second base is held: the adapter lives in the policy's own model under a name of its own, is active
for as long as it scores, and is neither trained nor saved with the policy. What that costs is the
adapter's megabytes. Else the reward model is loaded by itself, and says so.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core.adapters import active_names, adapted_modules, adapter_names, set_adapters
from lora_core.adapters.switch import activate
from lora_core.checkpoint import load_adapter, load_model
from lora_core.checkpoint.safetensors_folder import read_json_object
from lora_core.data import Tokenizer, load_tokenizer
from lora_core.data.branches import Branched, branch_batch
from lora_core.device import resident_dtype
from lora_core.evaluate import modes_kept
from lora_core.models import CausalLM
from lora_core.objectives.rewards import Sample
from lora_core.objectives.score import (
    HEAD,
    add_score_head,
    completion_scores,
    has_score_head,
)
from lora_core.train.batches import to_device

BATCH = 16  # answers that are scored together


class RewardModel:
    """Scores answers.

    Args:
        model: the decoder with its score head and the reward adapter.
        name: of that adapter.
        tok: the tokenizer of its base.
        own_ids: whether a sample's ids are of another tokenizer, and its text is to be read.
        said: how it was opened, in a line.
    """

    def __init__(
        self, model: CausalLM, name: str, tok: Tokenizer, own_ids: bool, said: str
    ) -> None:
        self.model, self.name, self.tok, self.own_ids, self.said = model, name, tok, own_ids, said

    @classmethod
    def open(
        cls,
        folder: Path,
        model: nn.Module | None = None,
        tok: Tokenizer | None = None,
        device: torch.device | None = None,
        base: tuple[str, str | None] | None = None,
    ) -> "RewardModel":
        """Open what `finetune --objective reward` left.

        Args:
            folder: the adapter's.
            model: a policy; its base is used where it is the reward adapter's.
            tok: the policy's tokenizer.
            device: of a reward model of its own.
            base: the policy's base: its folder, and its 4-bit code or None; None: it is not known,
                or does not stay as it is, as in full fine-tuning.

        Raises:
            FileNotFoundError: no adapter there, or not its base.
            ValueError: no reward adapter, or files that do not fit.
        """
        theirs, code = _base_of(folder)
        if isinstance(model, CausalLM) and base is not None and tok is not None:
            same = Path(base[0]).resolve() == Path(theirs).resolve()
            if same and base[1] == code:
                return cls._beside(folder, model, tok)
        place = device or torch.device("cpu")
        own = load_model(theirs, quantize=code, dtype=resident_dtype(place), device=place)
        add_score_head(own)
        load_adapter(own, folder, "reward")
        said = f"reward model: {folder} on a base of its own, {theirs}" + (
            "" if code is None else f" in {code}"
        )
        return cls(own.eval(), "reward", load_tokenizer(theirs), True, said)

    @classmethod
    def _beside(cls, folder: Path, model: CausalLM, tok: Tokenizer) -> "RewardModel":
        """The adapter in the policy's model, which is as before afterwards."""
        trained = [p for p in model.parameters() if p.requires_grad]
        names, known = active_names(model), adapter_names(model)
        name = next(n for n in _names("reward") if n not in known)
        known_head = HEAD in model._modules
        add_score_head(model)
        try:
            load_adapter(model, folder, name)
        except (ValueError, OSError):
            if not known_head:
                del model._modules[HEAD]
            raise
        set_adapters(model, names)
        for parameter in trained:
            parameter.requires_grad_(True)
        said = f"reward model: {folder}, on the policy's own base"
        return cls(model, name, tok, False, said)

    @contextmanager
    def _active(self) -> Iterator[None]:
        """The reward adapter alone, in evaluation mode, inside; whatever was disabled outside."""
        names = active_names(self.model)
        hosts = [host for _, host in adapted_modules(self.model)]
        enabled = [host.enabled for host in hosts]
        with modes_kept(self.model), torch.no_grad():
            self.model.eval()
            activate(self.model, [self.name])
            for host in hosts:
                host.enabled = True
            try:
                yield
            finally:
                activate(self.model, names)
                for host, before in zip(hosts, enabled, strict=True):
                    host.enabled = before

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Each answer's score, read after its last token.

        Args:
            samples: answers; their ids are used where they are of the same tokenizer.
        """
        rows = [self._row(sample) for sample in samples]
        order = sorted(range(len(rows)), key=lambda i: rows[i].tokens)
        found = [0.0] * len(rows)
        with self._active():
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                batch: Any = branch_batch(
                    [rows[i] for i in chosen], shared=False, pad_id=self.tok.pad_id
                )
                scores = completion_scores(self.model, to_device(batch, self.model.device))
                for i, score in zip(chosen, scores.tolist(), strict=True):
                    found[i] = score
        return found

    def _row(self, sample: Sample) -> Branched:
        if sample.completion_ids and not self.own_ids:
            return Branched(sample.prompt_ids, (sample.completion_ids,), where=sample.where)
        prompt = tuple(self.tok.encode_prompt(sample.prompt))
        answer = tuple(self.tok.encode(sample.completion))
        if sample.ended and self.tok.eos_id is not None:
            answer = (*answer, self.tok.eos_id)
        return Branched(prompt, (answer or prompt[-1:],), where=sample.where)


def _names(stem: str) -> Iterator[str]:
    """stem, stem2, stem3 …"""
    yield stem
    number = 2
    while True:
        yield f"{stem}{number}"
        number += 1


def _base_of(folder: Path) -> tuple[str, str | None]:
    """The base that a reward adapter names, and its 4-bit code."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: adapter_config.json is missing")
    config = read_json_object(file)
    if not has_score_head(folder):
        raise ValueError(
            f"{folder} is no reward model: its adapter has no {HEAD} head; train one with "
            "finetune --objective reward"
        )
    base = config.get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        raise FileNotFoundError(f"{file}: its base {base!r} is no folder here")
    run = folder / "run.json"
    recorded = read_json_object(run).get("base", {}) if run.is_file() else {}
    return str(base), recorded.get("quantize")
