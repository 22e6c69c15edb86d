r"""What all variants of a comparison share: base, data, questions, measures; made once.

Everything that can be wrong with the input is found here, before the first variant runs for
minutes: a file that is not there, a row that does not parse or has no reference, examples that do
not fit, a metric nobody knows. What the variants get is plain JSON with paths, since each runs in a
process of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_core.checkpoint import base_model_path
from lora_core.checkpoint.safetensors_folder import read_json_object
from lora_core.compare.config import CompareConfig
from lora_core.compare.shots import draw_shots
from lora_core.data import Tokenizer, load_tokenizer, parse_columns
from lora_core.data.stdlib import HELD_OUT_FILE, TRAIN_FILE, write_function_task
from lora_core.evaluate.metrics import check_metrics
from lora_core.evaluate.questions import Prompt, Question, read_questions
from lora_core.evaluate.retention import GeneralText, general_text
from lora_core.files import atomic_folder, sha256_file

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja")  # weights; tokenizer, template, end tokens


@dataclass(frozen=True)
class Task:
    """What a variant's process is told of the task; paths are absolute."""

    model: str
    """folder of the base"""
    data: str
    """file to train on"""
    eval_data: str
    """file of held-out rows"""
    general_text: str | None
    """file of general text; None: the standard library's"""
    columns: dict[str, str] | None
    """names of the data's fields"""
    metrics: tuple[str, ...]
    """measures of the answers"""
    eval_rows: int
    """held-out rows that are asked"""
    max_length: int
    """longest row trained on, in tokens"""
    max_new_tokens: int
    """longest answer, in tokens"""
    general_bytes: int
    """bytes of general text"""
    latency_runs: int
    """requests whose median is the latency"""
    latency_tokens: int
    """new tokens of each"""
    device: str | None
    """where; None: the accelerator, else the CPU"""

    def identity(self) -> dict[str, Any]:
        """What figures depend on: settings, and files by their content."""
        facts = asdict(self)
        model = Path(self.model)
        files = sorted(file for like in _MODEL_FILES for file in model.glob(like))
        facts["model"] = {file.name: sha256_file(file)[:16] for file in files}
        for name in ("data", "eval_data"):
            facts[name] = sha256_file(facts[name])[:16]
        # without a file the text is that of the interpreter at hand
        facts["general_text"] = self.read_general().sha256[:16]
        return facts

    def read_general(self) -> GeneralText:
        """The text that forgetting is measured on."""
        return general_text(self.general_text, limit_bytes=self.general_bytes)


def prepare(config: CompareConfig, out: Path) -> Task:
    """Find or make the files, and check all that can be checked without the model's weights.

    Args:
        config: the comparison.
        out: its folder, which gets the quickstart's data where no data is named.

    Returns:
        The task.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: an unknown metric, columns that cannot be read, or a folder of other data.
    """
    check_metrics(config.metrics, encoder=False)
    model = base_model_path() if config.model is None else Path(config.model)
    if not (model / "config.json").is_file():
        raise FileNotFoundError(f"{model} holds no model: config.json is missing")
    data, eval_data = _data(config, out)
    columns = None if config.columns is None else parse_columns(config.columns)
    same = {name: getattr(config, name) for name in _SAME}
    general = config.general_text
    return Task(
        model=str(model.resolve()),
        data=str(data.resolve()),
        eval_data=str(eval_data.resolve()),
        general_text=None if general is None else str(Path(general).resolve()),
        columns=columns,
        **same,
    )


_SAME = (
    "metrics",
    "eval_rows",
    "max_length",
    "max_new_tokens",
    "general_bytes",
    "latency_runs",
    "latency_tokens",
    "device",
)


def _data(config: CompareConfig, out: Path) -> tuple[Path, Path]:
    if config.data is not None and config.eval_data is not None:
        return Path(config.data), Path(config.eval_data)
    folder = out / "data"
    train, held = folder / TRAIN_FILE, folder / HELD_OUT_FILE
    if not folder.exists():
        with atomic_folder(folder) as aside:
            write_function_task(aside, config.eval_rows)
    for file in (train, held):
        if not file.is_file():
            raise ValueError(f"{folder} is there without {file.name}: choose another --out")
    return train, held


def asked_questions(task: Task) -> list[Question]:
    """The held-out rows, each with a reference.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row that asks nothing or has no reference, with its file:line.
    """
    questions = read_questions(task.eval_data, task.columns, task.eval_rows)
    for question in questions:
        if not question.references:
            raise ValueError(f"{question.where}: no reference answer to compare with; give one")
    if len(questions) < 2:
        raise ValueError(f"{task.eval_data} holds one row: a comparison needs 2 or more")
    return questions


def choose_examples(
    config: CompareConfig, task: Task, asked: Sequence[Question]
) -> dict[int, list[Prompt]] | None:
    """Examples of few-shot for each seed.

    Args:
        config: the comparison.
        task: its task.
        asked: its questions.

    Returns:
        Conversations by seed; None where few-shot is not asked for, or nothing fits and no number
        was named.

    Raises:
        ValueError: so many do not fit.
    """
    if "few-shot" not in config.methods:
        return None
    tok: Tokenizer = load_tokenizer(task.model)
    pool = read_questions(task.data, task.columns)
    read = read_json_object(Path(task.model) / "config.json")
    positions: Mapping[str, Any] = read.get("text_config", read)
    found: dict[int, list[Prompt]] = {}
    for seed in config.seeds:
        drawn = draw_shots(
            pool,
            asked,
            tok,
            context=positions.get("max_position_embeddings"),
            answer=max(task.max_new_tokens, task.latency_tokens),
            count=config.shots,
            seed=seed,
        )
        if drawn is None:
            return None
        found[seed] = drawn
    return found
