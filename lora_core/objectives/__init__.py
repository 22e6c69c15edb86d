"""What a run trains for: each objective's data, model, loss and files, for one and the same loop.

objective.py     what an objective is asked for, in order, and what it hands to the loop
setup.py         what it is told of the run
registry.py      the objectives by name
supervised.py    `sft`: the next token of the graded text
preference.py    `dpo`, `ipo`, `simpo`, `orpo` on pairs; kto.py: `kto` on rated completions
heads.py         `heads`: labels, tags and answers, a head for each data file
"""

from lora_core.objectives.objective import Objective, Work
from lora_core.objectives.registry import OBJECTIVES
from lora_core.objectives.setup import DataSettings, Setup

__all__ = ["OBJECTIVES", "DataSettings", "Objective", "Setup", "Work"]
