"""A run's rows of preferences: read, said, and split by prompt."""

from typing import Any, TypeVar

from lora_core.data import parse_sources
from lora_core.data.record_rows import RecordRows
from lora_core.objectives.setup import Setup

Kind = TypeVar("Kind", bound=RecordRows[Any, Any])


def check_preference_data(setup: Setup, name: str) -> None:
    """Refuse settings that rows of a prompt and its completions cannot follow.

    Args:
        setup: of the run.
        name: the objective's.

    Raises:
        ValueError: `train_on` all, or batches that are made from single sequences.
    """
    if setup.settings.train_on == "all":
        raise ValueError(
            f"train_on all grades the prompt, which {name} does not judge: choose assistant or last"
        )
    training = setup.training
    for setting, given in (
        ("packing", training.packing is not None),
        ("group_by_length", training.group_by_length),
    ):
        if given:
            raise ValueError(
                f"{setting} lays out single sequences; {name} lays out prompts with their "
                f"completions: leave {setting} out"
            )


def read_files(setup: Setup, kind: type[Kind]) -> tuple[Kind, Kind | None]:
    """Rows of `data`, and of `eval_data` (None: there is none); says what was read.

    Args:
        setup: of the run.
        kind: which rows.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: file:line of what cannot be read, or nothing is left.
    """
    settings = setup.settings

    def read(paths: list[tuple[str, float]]) -> Kind:
        return kind.from_jsonl(
            paths,
            setup.tok,
            template=settings.template,
            max_length=settings.max_length,
            columns=settings.column_names,
            train_on=settings.train_on,
            seed=setup.training.seed,
            control_text=settings.control_text,
            progress=lambda lines: setup.bar(lines, "records", "reading"),
        )

    rows = read(parse_sources(settings.data))
    setup.say(f"data: {rows.report}")
    if settings.eval_data is None:
        return rows, None
    held_out = read([(settings.eval_data, 1.0)])
    setup.say(f"evaluation data: {held_out.report}")
    return rows, held_out


def read_split(setup: Setup, kind: type[Kind]) -> tuple[Kind, Kind | None]:
    """Rows to train on and rows to evaluate on (None: none); no prompt is in both.

    Args:
        setup: of the run; says what was read and what was left out.
        kind: which rows.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: file:line of what cannot be read, or nothing is left.
    """
    settings = setup.settings
    rows, held_out = read_files(setup, kind)
    if held_out is not None:
        return rows, held_out
    if settings.eval_fraction == 0 or rows.prompts < 2:
        one = " (all rows have one prompt)" if settings.eval_fraction else ""
        setup.say(f"no evaluation: no rows are set aside{one}")
        return rows, None
    train, held_out = rows.split(settings.eval_fraction, setup.training.seed)
    setup.say(
        f"{len(train)} {kind.what}s to train on, {len(held_out)} to evaluate on, of other prompts"
    )
    return train, held_out
