"""`rollouts.jsonl`: every answer that a run sampled, with what became of it.

A line is written as soon as the answer is rewarded, before a step is made with it, so that what a
run found is there whatever stops it. A run that is resumed samples the rollouts after its
checkpoint anew: their lines, and one that a kill left half written, go first.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from lora_core.files import atomic_write
from lora_core.objectives.rewards import Sample, Scored

LOG = "rollouts.jsonl"


def write_answers(
    log: Path,
    number: int,
    samples: Sequence[Sample],
    scored: Sequence[Scored],
    advantages: Sequence[float] | None,
) -> None:
    """Append a rollout's answers.

    Args:
        log: the file; lines of this rollout and of later ones are removed.
        number: the rollout's.
        samples: the answers.
        scored: their rewards.
        advantages: one an answer, or its tokens' mean; None: there was nothing to weigh.
    """
    lines = []
    for i, (sample, one) in enumerate(zip(samples, scored, strict=True)):
        facts = {"rollout": number, "where": sample.where, "prompt": sample.prompt}
        facts |= {"completion": sample.completion, "reward": one.value, "parts": one.parts}
        facts["advantage"] = None if advantages is None else advantages[i]
        facts |= {"ended": sample.ended} | ({} if one.why is None else {"why": one.why})
        lines.append(json.dumps(facts, ensure_ascii=False) + "\n")
    kept = "" if number == 0 else _before(log, number)
    if kept is None:
        with open(log, "a", encoding="utf-8") as file:
            file.writelines(lines)
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(log, kept + "".join(lines))


def _before(log: Path, number: int) -> str | None:
    """What a log holds of earlier rollouts; None where it holds nothing else."""
    if not log.is_file():
        return ""
    with open(log, encoding="utf-8", newline="\n") as file:
        lines = list(file)  # not splitlines: an answer may hold U+2028, which JSON leaves as it is
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if json.loads(line)["rollout"] < number]
    return None if len(kept) == len(lines) else "".join(kept)
