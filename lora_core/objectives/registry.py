"""The objectives of `lora-core finetune --objective`, by name."""

from typing import Any

from lora_core.objectives.continual import Continual
from lora_core.objectives.heads import Heads
from lora_core.objectives.kto import KTO
from lora_core.objectives.objective import Objective
from lora_core.objectives.policy import GRPO, RLOO
from lora_core.objectives.ppo import PPO
from lora_core.objectives.preference import DPO, IPO, ORPO, SimPO
from lora_core.objectives.reward import Reward
from lora_core.objectives.rft import RFT
from lora_core.objectives.supervised import Supervised

OBJECTIVES: dict[str, type[Objective[Any]]] = {
    kind.name: kind
    for kind in (
        Supervised,
        Continual,
        DPO,
        IPO,
        SimPO,
        ORPO,
        KTO,
        Reward,
        GRPO,
        RLOO,
        PPO,
        RFT,
        Heads,
    )
}
