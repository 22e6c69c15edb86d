"""Measures of a model on data."""

from lora_core.evaluate.answering import answer_questions, prompt_of
from lora_core.evaluate.answers import Answer, AnswerFile, read_answers
from lora_core.evaluate.golden import GoldenSet, model_answers, read_golden, run_golden
from lora_core.evaluate.golden_diff import GoldenDiff, compare_golden
from lora_core.evaluate.golden_result import GoldenResult
from lora_core.evaluate.perplexity import Perplexity, modes_kept, perplexity
from lora_core.evaluate.questions import Question, parse_question, read_questions

__all__ = [
    "Answer",
    "AnswerFile",
    "GoldenDiff",
    "GoldenResult",
    "GoldenSet",
    "Perplexity",
    "Question",
    "answer_questions",
    "compare_golden",
    "model_answers",
    "modes_kept",
    "parse_question",
    "perplexity",
    "prompt_of",
    "read_answers",
    "read_golden",
    "read_questions",
    "run_golden",
]
