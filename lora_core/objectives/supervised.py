"""`sft`: supervised fine-tuning, the next token of the graded text."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_core.data import Record, SFTDataset, parse_sources, split
from lora_core.objectives.objective import Objective, Work
from lora_core.objectives.setup import Setup


@dataclass(frozen=True, kw_only=True)
class SupervisedOptions:
    """Nothing beyond what every run has."""


class Supervised(Objective[SupervisedOptions]):
    """Next-token cross-entropy over graded tokens."""

    name = "sft"
    help = "supervised fine-tuning: the next token of the graded text"
    options_class = SupervisedOptions

    def read(self, setup: Setup) -> None:
        """Rows to train on and rows to evaluate on."""
        settings = setup.settings

        def read(paths: list[tuple[str, float]]) -> SFTDataset:
            def progress(records: Iterable[Record]) -> Iterable[Record]:
                return setup.bar(records, "records", "reading")

            return SFTDataset.from_jsonl(
                paths,
                setup.tok,
                template=settings.template,
                max_length=settings.max_length,
                columns=settings.column_names,
                train_on=settings.train_on,
                seed=setup.training.seed,
                control_text=settings.control_text,
                progress=progress,
            )

        rows = read(parse_sources(settings.data))
        setup.say(f"data: {rows.report}")
        self.rows: Any = rows
        self.held_out: Any = None
        if settings.eval_data is not None:
            self.held_out = read([(settings.eval_data, 1.0)])
            setup.say(f"evaluation data: {self.held_out.report}")
        elif settings.eval_fraction == 0 or len(rows) < 2:
            setup.say("no evaluation: no rows are set aside")
        else:
            self.rows, self.held_out = split(rows, settings.eval_fraction, setup.training.seed)
            setup.say(f"{len(self.rows)} rows to train on, {len(self.held_out)} to evaluate on")

    def prepare(self, setup: Setup, model: nn.Module) -> Work:
        """The rows; the loop's own loss and batches."""
        return Work(self.rows, self.held_out)
