"""Measures of a model on data."""

from lora_core.evaluate.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
