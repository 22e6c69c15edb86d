"""Which cases the correctness check runs; `gpu_check` runs them.

Sizes are small, so that a case is mostly compiling: what only real sizes show (the error over
thousands of terms) is judged where those are timed. The last cases have more than 2^31 weights.
"""

from typing import Any

Case = dict[str, Any]


def cases(smoke: bool) -> list[Case]:
    """What is checked, most needed first; each has a family, that a contender depends on."""
    kinds = [("bfloat16", True), ("float16", False)]
    shapes = [(48, 128), (80, 192)] if smoke else [(80, 192), (1000, 4096), (4096, 1024)]
    rows = {"planes": (3,), "halves": (1, 17), "dense": (7,)}
    if not smoke:
        kinds += [("bfloat16", False), ("float16", True)]
        rows = {"planes": (1, 2, 3, 4, 8, 17), "halves": (1, 5, 16, 33, 100, 257), "dense": (300,)}
    found: list[Case] = []
    for dtype, nested in kinds:
        base = {"kind": "check", "dtype": dtype, "nested": nested, "runs": 2 if smoke else 3}
        found += [base | {"family": "expand", "shape": list(s)} for s in [*shapes, (7, 75)]]
        found += [base | {"family": "quantize", "shape": list(s)} for s in [*shapes, (7, 75)]]
        for family, counts in rows.items():
            for i, m in enumerate(counts):
                one = base | {"shape": list(shapes[i % len(shapes)]), "m": m}
                found.append(one | {"family": family})
                if family != "planes":
                    found.append(one | {"family": f"dx {family}"})
        for family in ("multiply", "dx", "lora", "mixed"):
            for i, m in enumerate((3, 17) if smoke else (1, 2, 40, 600)):
                found.append(base | {"family": family, "shape": list(shapes[i % 2]), "m": m})
        found.append(base | {"family": "multiply", "shape": [40, 75], "m": 3})
    if not smoke:
        wide = {"kind": "check", "dtype": "bfloat16", "nested": False, "shape": [65600, 33024]}
        wide |= {"m": 3, "large": True}
        families = ("planes", "halves", "dx", "expand", "quantize", "dense")
        found += [wide | {"family": family} for family in families]
    return found
