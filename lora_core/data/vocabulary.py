"""Whether tokenizer, chat template and model belong together.

Three parts of a folder can come from different models, and none of them says so. A template may
write `<|im_start|>` where the tokenizer has no such token: the marker is cut into pieces that the
model never saw as a marker. A tokenizer may give ids beyond the model's embedding: an index error,
or on a GPU a crash without a cause. Both are found here by asking, before anything is computed.

What is not an error: an embedding larger than the vocabulary (rows are padded to round numbers);
control tokens beyond the embedding that no template writes (Gemma 3's text models share the
tokenizer of the multimodal ones, one image token too long); headers that are plain text on purpose
(OLMo 2's `<|user|>`), told by this: no marker that the template spells is a token, yet one follows
the answer.
"""

from lora_core.data.chat import render_chat, template_markers
from lora_core.data.tokenizer import Tokenizer

_SPARSE = 0.8  # a tokenizer that names fewer of the model's rows than this is likely another one's


def template_fit(tok: Tokenizer, template: str) -> tuple[list[str], list[str]]:
    """Control markers that a template writes: those that are tokens, and those that are missing.

    A marker counts whether the template spells it out or puts it together from a role's name. Plain
    headers (see the module) count as known: they forge turns as tokens do.
    """
    spelled = template_markers(template)
    markers = dict.fromkeys(spelled)
    chat = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    for messages in (chat, chat[1:]):
        try:
            text = render_chat(template, messages, variables=tok.special_tokens)
        except ValueError:  # not every template has a system role
            continue
        markers.update(dict.fromkeys(template_markers(text)))
    missing = [marker for marker in markers if not tok.is_token(marker)]
    headers = {m for m in markers if m in spelled or m not in tok.special_tokens.values()}
    end = tok.encode(tok.answer_tail(template).lstrip())[:1]
    if headers == set(missing) and end and end[0] in tok.control_tokens:
        return list(markers), []
    return [marker for marker in markers if marker not in missing], missing


def missing_template_tokens(tok: Tokenizer, template: str | None = None) -> list[str]:
    """Control markers that a chat template writes and this tokenizer cuts into pieces.

    Args:
        tok: the tokenizer.
        template: Jinja text; None: all of the tokenizer's own.

    Returns:
        The markers in order of appearance; empty where template and tokenizer fit.
    """
    templates = tok.templates.values() if template is None else [template]
    return list(dict.fromkeys(m for text in templates for m in template_fit(tok, text)[1]))


def check_vocabulary(tok: Tokenizer, rows: int) -> str | None:
    """Compare a tokenizer with the number of rows of a model's embedding.

    Args:
        tok: the tokenizer.
        rows: `vocab_size` of the model.

    Returns:
        A line for the user where something is odd: control tokens beyond the embedding, or a
        tokenizer that names less than four fifths of the rows. None where nothing is.

    Raises:
        ValueError: a token that text or the template can give, or a named special token, has an id
            beyond the embedding.
    """
    size = tok.vocab_size
    if size <= rows:
        if size >= _SPARSE * rows:
            return None
        return (
            f"the tokenizer has {size} ids, the model {rows} embedding rows: is it the model's own?"
        )
    beyond = {index: tok.token(index) for index in range(rows, size)}
    first, text = next(item for item in beyond.items() if item[1] is not None)
    named = set(tok.special_tokens.values())
    written = "".join(tok.templates.values())
    used = [token for i, token in beyond.items() if token and i not in tok.control_tokens]
    used += [token for token in beyond.values() if token and (token in named or token in written)]
    if used:
        raise ValueError(
            f"the tokenizer has {size} ids, the model {rows} embedding rows: {text!r} (id {first}) "
            "has none; take the tokenizer that belongs to the model, or grow the model "
            f"(grow_vocabulary(model, {size}))"
        )
    return (
        f"the tokenizer has {size} ids, the model {rows} embedding rows: {text!r} (id {first}) "
        "cannot be used"
    )
