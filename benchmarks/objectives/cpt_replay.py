"""Continual pretraining with and without replay: how much less is forgotten?

The log of cpt.py, as many steps with replay as without: what is shown again takes the place of
some of the log, as it does where compute is given.
"""

import math
from pathlib import Path

from benchmarks.objectives.cpt import command, seen_by, write_texts
from benchmarks.objectives.recipe import Command, Measured, Recipe
from lora_core.evaluate import forgetting, general_text
from lora_core.evaluate.estimate import ratio


def _commands(folder: Path, quick: bool) -> list[Command]:
    write_texts(folder, quick)
    share = 0.75 if quick else 0.5  # a few steps are told apart by much
    return [command(folder, "alone", quick), command(folder, "replayed", quick, share)]


def _measure(folder: Path, quick: bool) -> Measured:
    text = general_text(limit_bytes=4000 if quick else 30_000)
    base, alone, kept = (
        seen_by(adapter, text) for adapter in (None, folder / "alone", folder / "replayed")
    )
    assert alone.row_bytes is not None
    pairs = zip(alone.row_nll, kept.row_nll, strict=True)
    return Measured(
        "forgetting of Python in bits per byte, without replay and with; the rise is what it keeps",
        forgetting(base, alone),
        forgetting(base, kept),
        ratio([(a - b) / math.log(2) for a, b in pairs], alone.row_bytes, unit="bytes"),
    )


RECIPE = Recipe(
    name="cpt_replay",
    says="a ship's log after Python, alone and with half of the tokens Python again",
    commands=_commands,
    measure=_measure,
    at_least=0.15,
    quick_at_least=0.03,
)
