"""Use trained heads: open a folder of `finetune --objective heads`, predict labels for a file.

The folder holds an adapter (or, for method full, a whole model) and heads beside it; the adapter
names its base. Rows are made as in training: heads.json has the settings.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.checkpoint.heads import load_heads, read_heads
from lora_core.data import Tokenizer
from lora_core.data.task_rows import TaskData, read_task
from lora_core.evaluate.estimate import Estimate
from lora_core.evaluate.heads import measure, predict
from lora_core.models.multi_head import MultiHead
from lora_core.runs.opening import ADAPTER_FILE, open_model
from lora_core.targets import nearest

__all__ = ["OpenedHeads", "open_heads"]


@dataclass
class OpenedHeads:
    """A backbone with its heads, ready to use."""

    model: MultiHead
    """in evaluation mode"""
    tok: Tokenizer
    rows: dict[str, Any]
    """how rows are made: arguments of `read_task`"""
    notes: list[str]
    """lines to print"""

    def predict(
        self,
        path: str | Path,
        task: str | None = None,
        columns: Mapping[str, str] | None = None,
        batch_size: int = 16,
    ) -> list[dict[str, Any]]:
        """What a head says of each line of a file.

        Args:
            path: JSON Lines, in the shape of the task's training data; labels may be missing.
            task: whose head; None: the one that is named like the file, or the only one of its
                kind.
            columns: this library's name to the file's name, {"text": "sentence"}.
            batch_size: rows in a batch.

        Returns:
            By line; see `lora_core.evaluate.heads.predict`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: rows that cannot be read, or no head for them.
        """
        return predict(self.model, self._rows(path, task, columns, False), batch_size)

    def measure(
        self,
        path: str | Path,
        task: str | None = None,
        columns: Mapping[str, str] | None = None,
        batch_size: int = 16,
    ) -> dict[str, Estimate]:
        """How good a head is on a labelled file; arguments as `predict`'s.

        Returns:
            See `lora_core.evaluate.heads.measure`.
        """
        return measure(self.model, self._rows(path, task, columns, True), batch_size)

    def _rows(
        self, path: str | Path, task: str | None, columns: Mapping[str, str] | None, labelled: bool
    ) -> TaskData:
        bare = read_task(path, self.tok, columns=columns, labelled=False, **self.rows)
        name = self._task(path, task, bare)
        if not labelled:
            bare.name = name
            return bare
        shape = self.model.head(name).shape
        like = TaskData(name, shape.kind, list(shape.labels), [], shape.problem)
        return read_task(path, self.tok, columns=columns, like=like, **self.rows)

    def _task(self, path: str | Path, task: str | None, rows: TaskData) -> str:
        """The head for a file's rows."""
        heads = self.model.task_heads()
        if task is not None and task not in heads:
            raise ValueError(f"no head {task!r}; {nearest(task, list(heads))}")
        fitting = [name for name, head in heads.items() if head.shape.kind == rows.kind]
        chosen = rows.name if task is None and rows.name in fitting else task
        if chosen is None and len(fitting) == 1:
            chosen = fitting[0]
        if chosen is None or chosen not in fitting:
            which = ", ".join(f"{n} ({h.shape.kind})" for n, h in heads.items())
            raise ValueError(
                f"{path} holds rows for a {rows.kind} head: name one that is; there are {which}"
            )
        return chosen


def open_heads(
    directory: str | Path, model: str | Path | None = None, *, device: str | None = None
) -> OpenedHeads:
    """Open the folder that `finetune --objective heads` left.

    Args:
        directory: with an adapter and heads, or with a whole model and heads.
        model: the base's folder; None: the one that the adapter names.
        device: None: the accelerator, else the CPU.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: no heads there, or no base.
        ValueError: files that do not fit together.
    """
    folder = Path(directory)
    rows = read_heads(folder)[1]
    adapted = (folder / ADAPTER_FILE).is_file()
    source = model if adapted else folder
    opened = open_model(source, folder if adapted else None, device=device, heads=True)
    heads = load_heads(folder, opened.model.config.hidden_size)
    whole = MultiHead(opened.model, heads).eval()
    return OpenedHeads(whole, opened.tok, rows, opened.notes)


def lines_of(predictions: list[dict[str, Any]]) -> Iterator[str]:
    """Predictions as JSON Lines."""
    for prediction in predictions:
        yield json.dumps(prediction, ensure_ascii=False)
