r"""A model in memory as a judge of pairs: which letter, A or B, does it find likelier?

The model is shown the question and both answers and would go on with a letter. Instead of
generating and parsing text, the judge compares log p("A") with log p("B") as the continuation. So
there is always a verdict, no sampling, one forward pass a letter, and a margin in nats that says
how sure it was. (Judges that write a reasoning first judge better and cost hundreds of tokens.)

A small model as a judge is mostly a reader of places. `pairwise` asks in both orders and tells the
share of verdicts that changed: look at it before the win rate. Models also favour long answers and
their own; the prompt asks them not to, which helps a little.
"""

import re
from typing import Any

import torch
from torch import nn

from lora_core.evaluate.perplexity import modes_kept
from lora_core.evaluate.questions import Prompt
from lora_core.evaluate.sides import key_of, spoken

JUDGE_PROMPT = """\
Two answers to the same question are shown. Decide which one is better: correct first, then \
helpful, then to the point. The order of the answers means nothing, and a longer answer is not \
better for its length.

[Question]
{question}
{reference}
[Answer A]
{first}

[Answer B]
{second}

Which answer is better? Reply with one letter, A or B."""
"""what the model is shown; {reference} becomes a section of its own, or nothing"""
_RAW_END = "\n\nThe better answer is answer"


class ModelJudge:
    """Compares two answers by a model's log-likelihoods; see `model_judge`."""

    def __init__(self, model: nn.Module, tok: Any, prompt: str, tie: float) -> None:
        missing = [name for name in ("{first}", "{second}") if name not in prompt]
        if missing:
            raise ValueError(f"the judge's prompt lacks {' and '.join(missing)}")
        if not tie >= 0:
            raise ValueError(f"tie must be 0 nats or more; got {tie}")
        self.model, self.tok, self.prompt, self.tie = model, tok, prompt, tie
        self.chat = getattr(tok, "chat_template", None) is not None
        self.settings = {"judge": key_of(prompt, self.chat), "tie": tie}

    def __call__(self, prompt: Prompt, first: str, second: str, reference: str = "") -> str:
        """ "first", "second", or "tie" where the margin is within `tie`."""
        margin = self.margin(prompt, first, second, reference)
        if abs(margin) <= self.tie:
            return "tie"
        return "first" if margin > 0 else "second"

    def margin(self, prompt: Prompt, first: str, second: str, reference: str = "") -> float:
        """log p("A") - log p("B") in nats: above 0 the first answer is preferred.

        Raises:
            ValueError: the text is longer than the model's positions, or its logits are NaN.
        """
        text = self._text(prompt, first, second, reference)
        if self.chat:
            start = list(self.tok.encode_prompt([{"role": "user", "content": text}]))
            letters = ("A", "B")
        else:
            start = list(self.tok.encode_prompt(text + _RAW_END))
            letters = (" A", " B")
        a, b = (self._log_likelihood(start, self.tok.encode(letter)) for letter in letters)
        if a != a or b != b:
            raise ValueError("the model's log-likelihoods are NaN: its weights hold NaN")
        return a - b

    def _text(self, prompt: Prompt, first: str, second: str, reference: str) -> str:
        """The judge's prompt filled in once: braces inside of answers stay what they are."""
        section = f"\n[Reference answer]\n{reference}\n" if reference else ""
        fill = {"question": spoken(prompt), "first": first, "second": second, "reference": section}
        return re.sub(
            r"\{(question|first|second|reference)\}", lambda found: fill[found[1]], self.prompt
        )

    @torch.no_grad()
    def _log_likelihood(self, start: list[int], end: list[int]) -> float:
        """log p(end | start) in nats."""
        limit = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        if limit is not None and len(start) + len(end) > limit:
            raise ValueError(
                f"question and answers take {len(start) + len(end)} tokens, more than the judge's "
                f"{limit} positions"
            )
        device = next(self.model.parameters()).device
        ids = torch.tensor([start + end], device=device)  # (1, T)
        with modes_kept(self.model):
            self.model.eval()
            logits = self.model(input_ids=ids).logits[0, len(start) - 1 : -1]  # (E, V)
        found = logits.double().log_softmax(dim=-1)
        return float(found.gather(1, ids[0, len(start) :, None]).sum())


def model_judge(
    model: nn.Module, tok: Any, *, prompt: str = JUDGE_PROMPT, tie: float = 0.0
) -> ModelJudge:
    """A judge for `pairwise` out of any model that continues text.

    Args:
        model: returns `.logits` (B, T, V).
        tok: its tokenizer. With a chat template the prompt is a user's turn; without one raw text.
        prompt: text with {first} and {second}, and where wanted {question} and {reference}.
        tie: margin in nats up to which it is a tie.

    Returns:
        A callable (prompt, first, second, reference="") -> "first", "second" or "tie". Its
        `settings` bind verdicts to prompt and tie, not to the weights: name those in `bound`.

    Raises:
        ValueError: a prompt without the answers, or a tie below 0.
    """
    return ModelJudge(model, tok, prompt, tie)
