"""Records, tokenizers, chat templates and graded rows."""

from lora_core.data.batch import collate, find_duplicates, find_overlap, split
from lora_core.data.chat import BUILTIN_TEMPLATES, builtin_template, load_template
from lora_core.data.control_text import ControlTextError
from lora_core.data.encoder import IGNORED, Encoder
from lora_core.data.grading import Graded, Grader
from lora_core.data.mixing import mix
from lora_core.data.packing import collate_packed, pack
from lora_core.data.pair_rows import (
    PairRow,
    PairRows,
    PromptRow,
    PromptRows,
    RatedRow,
    RatedRows,
)
from lora_core.data.preferences import Pair, Prompted, Rated, read_pairs, read_prompts, read_rated
from lora_core.data.records import (
    Chat,
    Completion,
    PlainText,
    Record,
    Tokens,
    parse_columns,
    parse_record,
    parse_records,
    parse_sources,
    read_records,
)
from lora_core.data.report import Report, SourceReport
from lora_core.data.sft import Rows, SFTDataset
from lora_core.data.task_rows import TaskData, read_task
from lora_core.data.text import TextWindows, encode_documents
from lora_core.data.tokenizer import Tokenizer
from lora_core.data.tokenizer_folder import load_tokenizer
from lora_core.data.vocabulary import check_vocabulary, missing_template_tokens

__all__ = [
    "BUILTIN_TEMPLATES",
    "IGNORED",
    "Chat",
    "Completion",
    "ControlTextError",
    "Encoder",
    "Graded",
    "Grader",
    "Pair",
    "PairRow",
    "PairRows",
    "PlainText",
    "PromptRow",
    "PromptRows",
    "Prompted",
    "Rated",
    "RatedRow",
    "RatedRows",
    "Record",
    "Report",
    "Rows",
    "SFTDataset",
    "SourceReport",
    "TaskData",
    "TextWindows",
    "Tokenizer",
    "Tokens",
    "builtin_template",
    "check_vocabulary",
    "collate",
    "collate_packed",
    "encode_documents",
    "find_duplicates",
    "find_overlap",
    "load_template",
    "load_tokenizer",
    "missing_template_tokens",
    "mix",
    "pack",
    "parse_columns",
    "parse_record",
    "parse_records",
    "parse_sources",
    "read_pairs",
    "read_prompts",
    "read_rated",
    "read_records",
    "read_task",
    "split",
]
