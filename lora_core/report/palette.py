"""Colours of reports and figures, for light and for dark grounds, in one place.

Six series colours, told apart with the usual kinds of colour blindness too: the hues are those of
Okabe and Ito, each made darker on white and lighter on black until a thin line has a contrast of 3.
No figure relies on colour alone: lines have labels at their ends, and points a shape.

A figure is drawn with the light colours. Inside a page each becomes a CSS variable of the same name
and follows the reader's scheme; a PNG stays light, on white.

Ref: Okabe and Ito 2008, "Color universal design" (jfly.uni-koeln.de/color).
"""

__all__ = ["DARK", "FAINT", "GROUND", "INK", "LIGHT", "RULE", "SERIES"]

LIGHT = {
    "ground": "#ffffff",
    "raised": "#f3f5f7",
    "ink": "#1c2126",
    "faint": "#586069",
    "rule": "#d5dae0",
    "link": "#0b61a4",
    "s0": "#0072b2",
    "s1": "#c85200",
    "s2": "#00875f",
    "s3": "#b3478b",
    "s4": "#8a6a00",
    "s5": "#3a3f8f",
}
"""name of the variable -> colour on a light ground"""

DARK = {
    "ground": "#14181c",
    "raised": "#20262c",
    "ink": "#e8ecf0",
    "faint": "#a3adb8",
    "rule": "#3a434c",
    "link": "#7cbcf2",
    "s0": "#56b4e9",
    "s1": "#f28c3c",
    "s2": "#2fc296",
    "s3": "#e08fbe",
    "s4": "#e6c229",
    "s5": "#9aa2f5",
}
"""the same on a dark one"""

GROUND, INK, FAINT, RULE = (LIGHT[name] for name in ("ground", "ink", "faint", "rule"))
SERIES = tuple(LIGHT[f"s{i}"] for i in range(6))
"""colours of series, in the order they are used"""
