"""Which cases the correctness check runs; `check` runs them.

Sizes are small, so that a case is mostly compiling: what only real sizes show (the error over
thousands of terms) is judged where those are timed. The last cases have more than 2^31 weights.
"""

from typing import Any

Case = dict[str, Any]

KINDS = (("bfloat16", True), ("float16", False), ("bfloat16", False), ("float16", True))
SHAPES = ([80, 192], [1000, 4096], [4096, 1024])
ROWS = {
    "planes": (1, 2, 3, 4, 8, 17),
    "halves": (1, 5, 16, 33, 100, 257),
    "dense": (300,),
    "multiply": (1, 2, 40, 600),
    "dx": (1, 2, 40, 600),
    "lora": (1, 2, 40, 600),
    "mixed": (1, 2, 40, 600),
}
# what a task's contenders depend on, and what its routes by themselves do
NEEDS = {
    "expand": {"expand"},
    "quantize": {"quantize"},
    "forward": {"multiply"},
    "dx": {"dx"},
    "step": {"multiply"},
    "lora": {"lora"},
    "lora step": {"lora"},
    "mixed": {"mixed"},
}
ROUTES_NEED = {"forward": {"planes", "halves", "dense"}, "dx": {"dx halves", "dx dense"}}
TOY_SHAPES = ([48, 128], [80, 192])
TOY_ROWS = {
    "planes": (3,),
    "halves": (1, 17),
    "dense": (7,),
    "multiply": (3, 17),
    "dx": (3, 17),
    "lora": (3,),
    "mixed": (9,),
}
ODD = ([7, 75], [40, 75])  # rows that are no whole number of blocks
OTHERS = ((32, "int4"), (256, "nf4"))  # block sizes and codes
BEYOND = [65600, 33024]  # more than 2^31 weights


def cases(smoke: bool) -> list[Case]:
    """What is checked, most needed first; each has a family, that a contender depends on."""
    found: list[Case] = []
    for dtype, nested in KINDS[:2] if smoke else KINDS:
        base = {"kind": "check", "dtype": dtype, "nested": nested, "runs": 2 if smoke else 3}
        found += [base | case for case in _of_one_kind(smoke)]
    base = {"kind": "check", "dtype": "bfloat16", "nested": True, "runs": 2, "m": 2}
    for block_size, code in OTHERS[:1] if smoke else OTHERS:
        other = {"shape": [48, 512], "block_size": block_size, "code": code}
        families = ("expand", "planes", "halves", "dx halves")
        found += [base | other | {"family": family} for family in families]
    if not smoke:
        base |= {"nested": False, "runs": 1, "m": 3, "shape": BEYOND, "large": True}
        families = ("planes", "halves", "dx", "expand", "quantize", "dense")
        found += [base | {"family": family} for family in families]
    return found


def _of_one_kind(smoke: bool) -> list[Case]:
    """Cases of one dtype, with double quantization or without."""
    shapes = TOY_SHAPES if smoke else SHAPES
    found: list[Case] = []
    for family in ("expand", "quantize"):
        found += [{"family": family, "shape": shape} for shape in [*shapes, ODD[0]]]
    for family, counts in (TOY_ROWS if smoke else ROWS).items():
        for i, m in enumerate(counts):
            case = {"shape": shapes[i % len(shapes)], "m": m}
            found.append(case | {"family": family})
            if family in ("halves", "dense"):
                found.append(case | {"family": f"dx {family}"})
    return [*found, {"family": "multiply", "shape": ODD[1], "m": 3}]
