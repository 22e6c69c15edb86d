"""Continual pretraining on a text of another field: is it learned?

A ship's log from a rule: the sentences are regular, the names and numbers in them are not. The
shipped base has read Python alone, and some of it is shown again as replay.
"""

import json
import random
from pathlib import Path

from benchmarks.objectives.recipe import Command, Measured, Recipe
from lora_core.checkpoint import base_model_path
from lora_core.data.corpus import is_held_out
from lora_core.data.stdlib import read_modules
from lora_core.evaluate import GeneralText, general_loss, general_text
from lora_core.evaluate.estimate import ratio
from lora_core.evaluate.perplexity import Perplexity
from lora_core.runs import open_model

SHIPS = ("Aurora", "Boreas", "Calypso", "Doris", "Electra", "Fortuna", "Galatea", "Hesper")
PORTS = ("Bergen", "Cadiz", "Danzig", "Elba", "Genoa", "Hull", "Lisbon", "Malmo", "Narvik", "Oslo")
CARGO = ("salt", "timber", "wool", "copper", "grain", "herring", "tar", "linen")
WEATHER = ("a fair wind", "heavy seas", "thick fog", "a steady gale", "calm water")
TEXT, REPLAY, HELD_OUT = "log.jsonl", "python.jsonl", "log-held-out.jsonl"


def entry(draw: random.Random) -> str:
    """One voyage."""
    ship, (start, end) = draw.choice(SHIPS), draw.sample(PORTS, 2)
    days, tons = draw.randint(2, 40), draw.randint(10, 300)
    return (
        f"The {ship} left {start} for {end} with {tons} tons of {draw.choice(CARGO)} on board. She "
        f"met {draw.choice(WEATHER)} off {draw.choice(PORTS)} and was {days} days at sea. The "
        f"master of the {ship} was paid {tons * days} crowns in {end}.\n"
    )


def write_rows(path: Path, texts: list[str]) -> None:
    """One document a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_texts(folder: Path, quick: bool) -> None:
    """The log to learn, Python to replay, and more of the log to measure on."""
    draw, documents = random.Random(0), 7 if quick else 320
    logs = ["".join(entry(draw) for _ in range(6)) for _ in range(documents + 8)]
    write_rows(folder / TEXT, logs[:documents])
    write_rows(folder / HELD_OUT, logs[documents:])
    known = read_modules(wanted=lambda name: not is_held_out(name))
    write_rows(folder / REPLAY, [module.text[:4000] for module in known[:: 80 if quick else 4]])


def command(folder: Path, out: str, quick: bool, share: float = 0.0) -> Command:
    """So many steps on the log, of which a share of the tokens is Python."""
    words = ["finetune", "--objective", "cpt", "--model", str(base_model_path())]
    words += ["--data", str(folder / TEXT), "--out", str(folder / out), "--eval-fraction", "0"]
    words += ["--lr", "2e-3", "--accumulate", "1", "--progress", "false"]
    words += ["--max-length", "64" if quick else "128", "--batch-size", "4" if quick else "8"]
    words += ["--steps", "14" if quick else "60", "--general-bytes", "2000" if quick else "30000"]
    replay = ["--replay", str(folder / REPLAY), "--replay-share", str(share)]
    return words + (replay if share else [])


def seen_by(adapter: Path | None, text: GeneralText) -> Perplexity:
    """What the base, or an adapter on it, makes of a text."""
    opened = open_model(str(base_model_path()), None if adapter is None else str(adapter))
    return general_loss(opened.model, opened.tok, text)


def _commands(folder: Path, quick: bool) -> list[Command]:
    write_texts(folder, quick)
    return [command(folder, "learned", quick, 0.4)]


def _measure(folder: Path, quick: bool) -> Measured:
    text = general_text(folder / HELD_OUT, limit_bytes=2000 if quick else 8000)
    before, after = seen_by(None, text), seen_by(folder / "learned", text)
    pairs = zip(after.row_correct, before.row_correct, strict=True)
    return Measured(
        "share of the tokens of unseen log that are the model's first choice",
        before.estimates()["accuracy"],
        after.estimates()["accuracy"],
        ratio([a - b for a, b in pairs], after.row_tokens, unit="tokens"),
    )


RECIPE = Recipe(
    name="cpt",
    says="a ship's log after Python, 40 % of the tokens Python again",
    commands=_commands,
    measure=_measure,
    at_least=0.5,
    quick_at_least=0.1,
)
