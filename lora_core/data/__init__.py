"""Records, tokenizers, chat templates and graded rows."""

from lora_core.data.chat import BUILTIN_TEMPLATES, builtin_template, load_template
from lora_core.data.text import TextWindows, encode_documents
from lora_core.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "BUILTIN_TEMPLATES",
    "TextWindows",
    "Tokenizer",
    "builtin_template",
    "encode_documents",
    "load_template",
    "load_tokenizer",
]
