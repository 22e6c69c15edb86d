"""Memory before a run: what it will need, part by part, and what fits a given memory."""

from lora_core.plan.budget import Fit, what_fits
from lora_core.plan.known import known_models, model_named
from lora_core.plan.memory import Plan, plan

__all__ = ["Fit", "Plan", "known_models", "model_named", "plan", "what_fits"]
