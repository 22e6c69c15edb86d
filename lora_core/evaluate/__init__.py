"""Measures of a model on data, each a figure with its count and interval.

figures               estimate (value, count, interval), figures (compared row by row)
the model's own       perplexity, choice, choices (their file), retention (what was forgotten)
answers               questions (their file), answering, answers (kept and read again),
                      metrics (all measures of answers by name)
text against text     squad (exact match, F1), bleu, bleu_score, bleu_tokens, rouge, lcs, ngrams,
                      pairs (checks of predictions and references)
variety               diversity (distinct, repetition, self-BLEU), near_duplicates (by ROUGE-L)
an encoder's eyes     encoding (texts to states), bertscore, embedding
golden set            golden, golden_checks, golden_schema, refusals, golden_result, golden_diff
one against another   judge, verdicts, model_judge, blind (a person votes), sides (checks of both)
by all of them        row_log (rows on disk as they come), shown (texts for a terminal)
the quickstart        function_task
"""

from lora_core.evaluate.answering import answer_questions, prompt_of
from lora_core.evaluate.answers import Answer, AnswerFile, read_answers
from lora_core.evaluate.bertscore import BertScore, bert_score
from lora_core.evaluate.bleu import Bleu, bleu, sentence_bleu
from lora_core.evaluate.blind import BlindResult, BlindTest, preference_rows, sign_test
from lora_core.evaluate.choice import ChoiceResult, choice_accuracy
from lora_core.evaluate.choices import Choice, read_choices
from lora_core.evaluate.diversity import distinct, repetition, self_bleu
from lora_core.evaluate.embedding import embed, embedding_similarity
from lora_core.evaluate.estimate import Estimate
from lora_core.evaluate.figures import Figure, difference, differences, of_perplexity
from lora_core.evaluate.golden import GoldenSet, model_answers, read_golden, run_golden
from lora_core.evaluate.golden_diff import GoldenDiff, compare_golden
from lora_core.evaluate.golden_result import GoldenResult
from lora_core.evaluate.judge import JudgeScores, WinRate, pairwise, score_judge
from lora_core.evaluate.metrics import METRICS, Metric, check_metrics, measure, metric_figures
from lora_core.evaluate.model_judge import JUDGE_PROMPT, ModelJudge, model_judge
from lora_core.evaluate.perplexity import Perplexity, modes_kept, perplexity
from lora_core.evaluate.questions import Question, parse_question, read_questions
from lora_core.evaluate.retention import GeneralText, forgetting, general_loss, general_text
from lora_core.evaluate.rouge import Rouge, rouge, rouge_row
from lora_core.evaluate.squad import exact_match, f1_score, normalize_answer

__all__ = [
    "JUDGE_PROMPT",
    "METRICS",
    "Answer",
    "AnswerFile",
    "BertScore",
    "Bleu",
    "BlindResult",
    "BlindTest",
    "Choice",
    "ChoiceResult",
    "Estimate",
    "Figure",
    "GeneralText",
    "GoldenDiff",
    "GoldenResult",
    "GoldenSet",
    "JudgeScores",
    "Metric",
    "ModelJudge",
    "Perplexity",
    "Question",
    "Rouge",
    "WinRate",
    "answer_questions",
    "bert_score",
    "bleu",
    "check_metrics",
    "choice_accuracy",
    "compare_golden",
    "difference",
    "differences",
    "distinct",
    "embed",
    "embedding_similarity",
    "exact_match",
    "f1_score",
    "forgetting",
    "general_loss",
    "general_text",
    "measure",
    "metric_figures",
    "model_answers",
    "model_judge",
    "modes_kept",
    "normalize_answer",
    "of_perplexity",
    "pairwise",
    "parse_question",
    "perplexity",
    "preference_rows",
    "prompt_of",
    "read_answers",
    "read_choices",
    "read_golden",
    "read_questions",
    "repetition",
    "rouge",
    "rouge_row",
    "run_golden",
    "score_judge",
    "self_bleu",
    "sentence_bleu",
    "sign_test",
]
