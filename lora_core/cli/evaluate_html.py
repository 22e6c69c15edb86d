"""The findings of `lora-core evaluate` as one page: figures, what was forgotten, answers, the run.

In reading order: what a reader decides by comes first, how the adapter came about last.
"""

from pathlib import Path

from torch import nn

from lora_core.cli.evaluate_model import Findings, Side
from lora_core.cli.evaluate_show import estimates
from lora_core.evaluate.answers import Answer
from lora_core.evaluate.questions import Prompt
from lora_core.report import Page, run_report

_SAMPLES = 10  # answers that are shown


def write_page(path: str, found: Findings, model: nn.Module | None = None) -> Path:
    """Write the report.

    Args:
        path: the file; its folder must exist.
        found: what it tells.
        model: with the adapter that `found` names, for the sizes of its update.

    Returns:
        The file.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    adapter = found.facts.get("adapter")
    title = adapter or found.facts.get("model") or found.facts["answers"]
    page = Page(f"Evaluation of {Path(title).name or title}", "lora-core evaluate")
    page.facts({name: value for name, value in found.facts.items() if value is not None})
    _figures(page, found)
    _forgetting(page, found)
    _golden(page, found)
    _answers(page, found.side, found.base)
    if adapter is not None:
        run_report(page, adapter, model)
    if found.notes:
        page.heading("Notes")
        for note in found.notes:
            page.text(note)
    return page.write(path)


def _figures(page: Page, found: Findings) -> None:
    page.heading("Figures")
    after = estimates(found.side.figures)
    if not after:
        page.text("No figure was asked for.")
    elif found.base is None:
        page.table(["figure", "value"], list(after.items()), "Each with its interval and count")
    else:
        before, moved = estimates(found.base.figures), found.differences
        rows = [(name, one, before.get(name), moved.get(name)) for name, one in after.items()]
        page.table(
            ["figure", "adapter", "base", "difference"],
            rows,
            "The adapter, the base without it, and the difference on the same rows",
            notes=["An interval of the difference that leaves out 0 is one the rows can tell."],
        )


def _forgetting(page: Page, found: Findings) -> None:
    page.heading("Forgetting")
    if found.forgetting is None:
        page.text("Not measured: it needs an adapter, whose base is measured on the same text.")
        return
    low, high = found.forgetting.low, found.forgetting.high
    word = "more" if found.forgetting.value > 0 else "fewer"
    sure = "" if low > 0 or high < 0 else " The interval holds 0: the text cannot tell."
    page.text(
        f"General text costs {abs(found.forgetting.value):.4g} bits per byte {word} with the "
        f"adapter than without it.{sure}"
    )
    page.facts({"forgetting, bits per byte": found.forgetting})


def _golden(page: Page, found: Findings) -> None:
    if found.golden is None:
        return
    page.heading("Golden set")
    page.facts({"rows that pass": found.golden.pass_rate})
    page.code((found.diff or found.golden).text())


def _answers(page: Page, side: Side, base: Side | None) -> None:
    if not side.answers:
        return
    page.heading("Answers")
    others = base.answers if base is not None else []
    for place, answer in enumerate(side.answers[:_SAMPLES]):
        with page.details(_title(answer), opened=place < 3):
            page.quote(asked(answer.messages), "asked")
            page.quote(answer.text, "answered")
            if others:
                page.quote(others[place].text, "the base answered")
            for reference in answer.references:
                page.quote(reference, "reference")
    left = len(side.answers) - _SAMPLES
    if left > 0:
        page.text(f"The first {_SAMPLES} of {len(side.answers)}.")


def asked(messages: Prompt) -> str:
    """A question as text: the last turn, or the raw text."""
    return messages if isinstance(messages, str) else str(messages[-1].get("content", ""))


def _title(answer: Answer) -> str:
    first = (asked(answer.messages).strip().splitlines() or [""])[0]
    return f"{answer.id}: {first[:80]}"
