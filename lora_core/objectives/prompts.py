"""A run's prompts: read, said, and never set aside unless that is asked for."""

from collections.abc import Sequence

from torch import distributed, nn

from lora_core.data import PromptRow, PromptRows
from lora_core.objectives.preference_data import read_files
from lora_core.objectives.setup import Setup


def read_prompts(setup: Setup, name: str) -> tuple[PromptRows, PromptRows | None]:
    """Prompts to answer and prompts to evaluate on (None: no evaluation).

    Answering held-out prompts costs sampling, so that there are none but those of `eval_data`.

    Args:
        setup: of the run; says what was read.
        name: the objective's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: file:line of what cannot be read, or nothing is left.
    """
    rows, held_out = read_files(setup, PromptRows)
    if held_out is None:
        setup.say(f"no evaluation: {name} answers held-out prompts of --eval-data alone")
    return rows, held_out


def beyond_positions(rows: Sequence[PromptRow], new_tokens: int, model: nn.Module) -> str | None:
    """A line where prompts and answers may reach beyond the positions that a model was made for."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(len(row.ids) for row in rows)
    if not isinstance(positions, int) or longest + new_tokens <= positions:
        return None
    return (
        f"prompts of up to {longest} tokens with {new_tokens} new ones reach beyond the "
        f"{positions} positions of the model, which writes worse there"
    )


def refuse_processes(name: str) -> None:
    """Refuse to sample in several processes, each of which would sample the same."""
    joined = distributed.is_available() and distributed.is_initialized()
    if joined and (world := distributed.get_world_size()) > 1:
        raise ValueError(f"{name} samples in one process; got {world}: start it without torchrun")
