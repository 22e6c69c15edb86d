"""Measures of a model on data."""

from lora_core.evaluate.answering import answer_questions, prompt_of
from lora_core.evaluate.answers import Answer, AnswerFile, read_answers
from lora_core.evaluate.perplexity import Perplexity, modes_kept, perplexity
from lora_core.evaluate.questions import Question, parse_question, read_questions

__all__ = [
    "Answer",
    "AnswerFile",
    "Perplexity",
    "Question",
    "answer_questions",
    "modes_kept",
    "parse_question",
    "perplexity",
    "prompt_of",
    "read_answers",
    "read_questions",
]
