"""Checkpoints that a run can be continued from bit for bit.

`out/checkpoints/step-00000120/` holds

    weights.safetensors     the trained parameters by name
    optimizer.safetensors   the optimizer's tensors as `<parameter number>.<name>`
    rng.safetensors         torch's generators, CPU and CUDA
    state.json              position, best evaluation, optimizer's groups, Python's and NumPy's
                            generators, loss scale, configuration
    history.jsonl           one record a step so far
    manifest.json           SHA-256 and size of each file above

The folder is written aside and renamed, then named in `checkpoints/latest`. Reading checks every
file against the manifest; a folder that fails is passed over with a warning that says why, and the
one before it is used. The frozen base is not saved: it is the model the caller gave.
"""

import json
import random
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.files import atomic_folder, latest, publish, sha256_file

FORMAT = 1
_FILES = ("weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


@dataclass
class Progress:
    """Where a run stands; all that is needed beside weights, optimizer and generators."""

    step: int = 0
    """steps done"""
    epoch: int = 0
    """epoch of the next step"""
    group: int = 0
    """number of the next step within its epoch"""
    tokens: int = 0
    """tokens fed to the model so far"""
    best_step: int | None = None
    """step of the best evaluation"""
    best_loss: float | None = None
    """its loss"""
    since_best: int = 0
    """evaluations since then"""
    stopped_early: bool = False
    """whether patience ran out"""
    history: list[dict[str, Any]] = field(default_factory=list)
    """one record a step"""


def _numpy() -> Any:
    import numpy  # noqa: ICN001  # only its generator's state is wanted

    return numpy


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    _numpy().random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Any]:
    """The optimizer's state as tensors by `<number>.<name>` and the rest as JSON."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for number, entries in state["state"].items():
        for name, value in entries.items():
            target = tensors if isinstance(value, Tensor) else plain
            target[f"{number}.{name}"] = value
    return tensors, {"groups": state["param_groups"], "plain": plain}


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["plain"].items()]:
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})


def _generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, gauss = _numpy().random.get_state()
    numpy_state = [kind, keys.tolist(), position, has_gauss, gauss]
    return tensors, {"python": random.getstate(), "numpy": numpy_state}


def _restore_generators(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    torch.set_rng_state(tensors["cpu"])
    cuda = [tensors[k] for k in sorted(tensors) if k.startswith("cuda.")]
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *others = rest["numpy"]
    _numpy().random.set_state((kind, _numpy().array(keys, dtype="uint32"), *others))


@dataclass
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    """out/checkpoints"""
    keep: int = 2
    """newest ones kept; the best is kept beside them"""

    def save(
        self,
        progress: Progress,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        identity: Mapping[str, Any],
    ) -> Path:
        """Write and publish a checkpoint, then drop those no longer kept.

        Args:
            progress: where the run stands.
            parameters: the trained ones, by name.
            optimizer: with its state.
            scaler: of the loss.
            identity: configuration and facts that a continuing run has to share.

        Returns:
            The checkpoint's folder.
        """
        from safetensors.torch import save_file

        path = self.folder / f"step-{progress.step:08d}"
        tensors, rest = _optimizer_tensors(optimizer)
        rng_tensors, rng = _generators()
        fields = {k: v for k, v in vars(progress).items() if k != "history"}
        state = {
            "format": FORMAT,
            "progress": fields,
            "optimizer": rest,
            "rng": rng,
            "scaler": scaler.state_dict(),
            "identity": identity,
        }
        with atomic_folder(path) as aside:
            save_file(_owned(parameters), aside / "weights.safetensors")
            save_file(_owned(tensors), aside / "optimizer.safetensors")
            save_file(rng_tensors, aside / "rng.safetensors")
            (aside / "state.json").write_text(json.dumps(state))
            lines = "".join(json.dumps(record) + "\n" for record in progress.history)
            (aside / "history.jsonl").write_text(lines)
            sizes = {
                f.name: {"bytes": f.stat().st_size, "sha256": sha256_file(f)}
                for f in sorted(aside.iterdir())
            }
            (aside / "manifest.json").write_text(json.dumps(sizes, indent=1))
        publish(self.folder, path.name)
        self._prune(progress)
        return path

    def _steps(self) -> list[Path]:
        """The checkpoints' folders, newest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else []
        return sorted((p for p in found if re.fullmatch(r"step-\d{8,}", p.name)), reverse=True)

    def _prune(self, progress: Progress) -> None:
        best = None if progress.best_step is None else f"step-{progress.best_step:08d}"
        for path in self._steps()[self.keep :]:
            if path.name != best:
                shutil.rmtree(path)

    def clear(self) -> None:
        """Remove all checkpoints: a run that starts afresh must not find them later."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def newest_good(self) -> "Loaded | None":
        """The newest checkpoint that is whole, None without any; damaged ones are named."""
        published = latest(self.folder)
        paths = self._steps()
        if published is not None:
            # one renamed but not yet published is whole, yet the run did not count on it
            paths = [p for p in paths if p.name <= published.name]
        for path in paths:
            try:
                return Loaded.read(path)
            except (ValueError, OSError) as error:
                warnings.warn(
                    f"checkpoint {path.name} is damaged ({error}); trying the one before it",
                    stacklevel=2,
                )
        return None


@dataclass
class Loaded:
    """A checkpoint read from disk and checked."""

    path: Path
    progress: Progress
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any]

    @staticmethod
    def read(path: Path) -> "Loaded":
        """Read and check one checkpoint.

        Args:
            path: its folder.

        Returns:
            Its content, on the CPU.

        Raises:
            ValueError: a file differs from the manifest, or the format is unknown.
            FileNotFoundError: a file is missing.
        """
        from safetensors.torch import load_file

        manifest = json.loads((path / "manifest.json").read_text())
        for name in _FILES:
            if name not in manifest:
                raise ValueError(f"manifest.json does not list {name}")
        for name, entry in manifest.items():
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"{name} has {size} bytes instead of {entry['bytes']}")
            if sha256_file(path / name) != entry["sha256"]:
                raise ValueError(f"{name} differs from its SHA-256 in manifest.json")
        state = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}; this version reads {FORMAT}")
        lines = (path / "history.jsonl").read_text().splitlines()
        return Loaded(
            path=path,
            progress=Progress(**state["progress"], history=[json.loads(line) for line in lines]),
            weights=load_file(path / "weights.safetensors"),
            optimizer=load_file(path / "optimizer.safetensors"),
            rng=load_file(path / "rng.safetensors"),
            state=state,
        )

    def restore(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
    ) -> None:
        """Put weights, optimizer, loss scale and generators back.

        Raises:
            ValueError: the model's trained parameters are not those of the checkpoint.
        """
        restore_weights(parameters, self.weights, self.path)
        _restore_optimizer(optimizer, self.optimizer, self.state["optimizer"])
        scaler.load_state_dict(self.state["scaler"])
        _restore_generators(self.rng, self.state["rng"])


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies that share no storage, as safetensors wants them."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def restore_weights(
    parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], where: Path
) -> None:
    """Copy saved weights into the trained parameters.

    Args:
        parameters: the trained ones, by name.
        weights: as saved.
        where: the checkpoint, for the message.

    Raises:
        ValueError: names or shapes differ; nothing was copied.
    """
    wrong: Iterable[str] = sorted(parameters.keys() ^ weights.keys()) or [
        name for name, p in parameters.items() if p.shape != weights[name].shape
    ]
    if wrong:
        raise ValueError(
            f"{where} holds other trained parameters than the model: {', '.join(list(wrong)[:5])}; "
            "resume with the model and adapter it was made with"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
