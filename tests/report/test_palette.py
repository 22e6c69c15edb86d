"""Colours and rules of the style sheet: contrast, colour blindness, nothing from outside."""

import itertools
import re

import numpy as np
import pytest

from lora_core.report.palette import DARK, LIGHT, SERIES
from lora_core.report.stylesheet import style_sheet

# Machado et al. 2009, severity 1, on linear RGB
SIGHTS = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    low, high = sorted(float(TO_XYZ[1] @ linear(c)) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt(np.maximum(TO_XYZ @ rgb / (0.9505, 1.0, 1.089), 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_contrast_is_computed_as_the_standard_has_it() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#ffffff", "#767676") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_is_legible(scheme: dict[str, str]) -> None:
    for ground in ("ground", "raised"):
        for text in ("ink", "faint", "link"):
            assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground)
    for name in scheme:
        if name[1:].isdecimal():  # names of points are written in these
            assert contrast(scheme[name], scheme["ground"]) >= 4.5, name


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("sight", SIGHTS)
def test_series_are_told_apart(scheme: dict[str, str], sight: str) -> None:
    series = [linear(colour) for name, colour in scheme.items() if name[1:].isdecimal()]
    seen = [lab(np.clip(np.array(SIGHTS[sight]) @ c, 0, 1)) for c in series]
    assert len(seen) == len(SERIES) == 7
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


def test_both_schemes_have_the_same_names_and_light_colours_differ() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)  # else a figure's colour names two variables


def test_the_sheet_uses_only_what_it_has() -> None:
    sheet = style_sheet()
    assert set(re.findall(r"var\(--(\w+)\)", sheet)) <= LIGHT.keys()
    assert not re.search(r"url\(|@import|https?:|//", sheet)
    assert sheet.count("{") == sheet.count("}")
    assert "font:16px/" in sheet
    for needed in ("prefers-color-scheme:dark", "@media print", "overflow-x:auto"):
        assert needed in sheet
