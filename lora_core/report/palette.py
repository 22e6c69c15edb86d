"""Colours of reports and figures, for light and for dark grounds, in one place.

Seven series colours. The first two are close to Okabe and Ito's blue and vermilion; the rest were
searched for at random, so that the two nearest of the seven are as far apart as can be for normal
sight and for three kinds of colour blindness (simulated after Machado et al.), while each can be
read as text on its ground (a contrast of 4.5 or more). The nearest pairs are 22 apart in CIELAB; a
test holds that. No figure relies on colour alone all the same: what is told apart has a shape or a
name too.

A figure is drawn with the light colours. Inside a page each becomes a CSS variable of the same name
and follows the reader's scheme; a PNG stays light, on white.

Ref: Okabe and Ito 2008, "Color universal design" (jfly.uni-koeln.de/color); Machado, Oliveira and
Fernandes 2009, "A physiologically-based model for simulation of color vision deficiency", IEEE TVCG
15(6).
"""

__all__ = ["DARK", "FAINT", "GROUND", "INK", "LIGHT", "RULE", "SERIES", "SHAPES"]

LIGHT = {
    "ground": "#ffffff",
    "raised": "#f3f5f7",
    "ink": "#1c2126",
    "faint": "#586069",
    "rule": "#d5dae0",
    "link": "#0b61a4",
    "s0": "#0072b2",
    "s1": "#bf4d00",
    "s2": "#064d41",
    "s3": "#6f0c6f",
    "s4": "#5b4e25",
    "s5": "#0e17d6",
    "s6": "#6f7382",
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
    "s2": "#1ffc8d",
    "s3": "#fc3088",
    "s4": "#f4de2e",
    "s5": "#9576fc",
    "s6": "#c9cfde",
}
"""the same on a dark one"""

GROUND, INK, FAINT, RULE = (LIGHT[name] for name in ("ground", "ink", "faint", "rule"))
SERIES = tuple(colour for name, colour in LIGHT.items() if name[1:].isdecimal())
"""colours of series, in the order they are used"""
SHAPES = "osD^vPX<>"
"""shapes of points, in the same manner; not as many, so that the pairs repeat late"""
