"""A figure's SVG made fit for a page: smaller, in the page's font, in the reader's colours.

matplotlib writes a file that stands alone. Inside a page some of it would reach beyond the figure:
ids are the whole page's, and so is a style element. So what is not referred to loses its id and the
rest gets a mark of its own; the style element goes (the page's sheet has the rule). Colours of the
palette become CSS variables, which is how one drawing serves light and dark. Coordinates are
rounded to a hundredth of a point, and the list of fonts gives way to the page's: half of the bytes.

Only tags are touched, never the text between them, which may be anything. matplotlib escapes < and
> there and in attributes, so that tags can be told by a regular expression.
"""

import hashlib
import re
from html import escape

from lora_core.report.cells import visible
from lora_core.report.palette import LIGHT

__all__ = ["inline_svg"]


def inline_svg(text: str, alt: str, kind: str) -> str:
    """Turn an SVG file of matplotlib's into an element of a page.

    Args:
        text: the file.
        alt: what it shows, in words.
        kind: class of the element.

    Returns:
        `<svg …>…</svg>`, without references to anything outside.

    Raises:
        ValueError: no SVG of matplotlib's.
    """
    opening = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', text)
    if opening is None:
        raise ValueError(f"this is no SVG file: it begins {text[:40]!r}")
    inner = text[opening.end() :]
    inner = re.sub(r"<(metadata|style)\b.*?</\1>", "", inner, flags=re.DOTALL)
    inner = re.sub(r"<defs>\s*</defs>|(?<=>)\s+(?=<)", "", inner)
    mark = "f" + hashlib.sha256((kind + text).encode()).hexdigest()[:6]
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', inner))
    head = (
        f'<svg class="{kind}" viewBox="{opening[1]}" role="img" '
        f'aria-label="{escape(visible(alt), quote=True)}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return head + re.sub(r"<[^>]*>", lambda tag: _fitted(tag[0], mark, used), inner).strip()


def _fitted(tag: str, mark: str, used: set[str]) -> str:
    """One tag, as the page wants it."""
    for name, colour in LIGHT.items():
        tag = tag.replace(f": {colour}", f": var(--{name})")
    tag = re.sub(r" font-family: [^;\"]*;", "", tag)
    tag = re.sub(r"\s+", " ", tag)
    tag = re.sub(r"-?\d+\.\d{3,}", lambda digits: f"{float(digits[0]):.2f}", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", tag)
    tag = re.sub(r' id="([^"]+)"', lambda m: f' id="{mark}{m[1]}"' if m[1] in used else "", tag)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{mark}", tag)
