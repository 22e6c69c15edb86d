"""Measures of a model on data."""

from lora_core.evaluate.perplexity import Perplexity, modes_kept, perplexity

__all__ = ["Perplexity", "modes_kept", "perplexity"]
