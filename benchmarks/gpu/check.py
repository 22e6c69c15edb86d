"""Is it right on this device? Every operator against float64, before anything is timed.

Inputs are random and carry what breaks kernels: a block of zeros, an outlier, rows of very
different size, sizes that no tile divides, strided rows, a row of NaN. `judge` says what
passes. Each case belongs to a family; a contender is not timed unless all cases of the family that
it depends on have passed.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.contenders import ROUTES, Dense, Ours
from benchmarks.gpu.judge import captured, compared, poisoned, reference, repeated, same_bits
from benchmarks.gpu.problem import DTYPES, Lora, decoded, device, normal, random_lora, random_weight
from benchmarks.gpu.timing import Tensors, perform
from lora_core.quant.codebook import codebook
from lora_core.quant.double_quant import dynamic_map
from lora_kernels import Weight4, dequantize4, quantize4

ROOM = 24 << 30  # bytes of free memory that the largest cases take
Case = dict[str, Any]


def check(case: Case) -> Iterator[dict[str, Any]]:
    """Run one case.

    Yields:
        One row: the case, `passed`, and what was wrong.
    """
    if case.get("large") and torch.cuda.mem_get_info()[0] < ROOM:
        yield case | {"passed": True, "problems": [], "note": "not run: too little memory is free"}
        return
    with poisoned():
        problems = list(problems_of(case))
    yield case | {"passed": not problems, "problems": problems}


def problems_of(case: Case) -> Iterator[str]:
    """What is wrong with an operator in one case, a line each."""
    dtype = DTYPES[case["dtype"]]
    n, k = case["shape"]
    if case.get("large"):
        yield from _beyond_32_bits(case, n, k, dtype)
    elif case["family"] == "quantize":
        yield from _quantize(case, n, k, dtype)
    elif case["family"] == "expand":
        yield from _expand(case, n, k, dtype)
    elif case["family"] in ("lora", "mixed"):
        yield from _lora(case, dtype)
    elif case["family"].startswith("dx"):
        yield from _dx(case, dtype)
    else:
        yield from _forward(case, dtype)


# --- the families ------------------------------------------------------------------------------


def _quantize(case: Case, n: int, k: int, dtype: torch.dtype) -> Iterator[str]:
    w = normal(n, k, seed=5, dtype=dtype)
    w.view(-1)[:64] = 0
    w.view(-1)[64:128] *= 1e-4

    def run() -> Tensors:
        q = Ours().quantize(w, case["nested"])
        own = (q.codes, q.scales, q.scale_absmax, q.scale_offset)
        return tuple(t for t in own if t is not None)

    found = yield from repeated(run, case["runs"])
    codes, scales = found[:2]
    with reference():
        exact = quantize4(w.cpu(), codebook("nf4").table(), 64)
    if not torch.equal(codes.cpu(), exact[0]):
        different = int((codes.cpu() != exact[0]).sum())
        yield f"{different} of {codes.numel()} bytes of codes differ from the definition"
    if not case["nested"]:
        if not torch.equal(scales.cpu(), exact[1]):
            yield "the scales differ from the definition"
        return
    yield from _nearest_scales(exact[1].double(), *(t.cpu() for t in found[1:]))


def _nearest_scales(exact: Tensor, q: Tensor, absmax: Tensor, offset: Tensor) -> Iterator[str]:
    """8-bit scales: is each the nearest entry, to the rounding of the mean?"""
    slack = 1e-5 * float(exact.abs().max())
    if abs(float(offset) - float(exact.mean())) > slack:
        yield f"the offset is {float(offset)}, the mean of the scales {float(exact.mean())}"
    spread = absmax.double().repeat_interleave(256)[: len(exact)]
    choices = dynamic_map().double() * spread[:, None]  # (blocks, 256)
    distances = (exact - offset.double())[:, None] - choices
    chosen = distances.gather(1, q.long()[:, None]).abs().squeeze(1)
    far = chosen - distances.abs().amin(1) > slack
    if bool(far.any()):
        yield f"{int(far.sum())} of {len(exact)} scales are not the nearest entry"


def _expand(case: Case, n: int, k: int, dtype: torch.dtype) -> Iterator[str]:
    weight = _weight(case)
    out = torch.full((n, k), torch.nan, dtype=dtype, device=device())

    def run() -> Tensors:
        out.fill_(torch.nan)
        return (Ours().expand(weight, out).clone(),)

    found = yield from repeated(run, case["runs"])
    here = Weight4(*(t.cpu() if isinstance(t, Tensor) else t for t in weight))
    with reference():
        tables = (here.codes, here.scales, here.table, here.block_size, n * k, dtype)
        exact = dequantize4(*tables, nested=here.nested).view(n, k)
    if not same_bits(found[0].cpu(), exact):
        yield f"{int((found[0].cpu() != exact).sum())} values differ from the definition's bits"
    if not torch.equal(exact, decoded(here).to(dtype)):
        yield "the definition differs from table times scale"


def _forward(case: Case, dtype: torch.dtype) -> Iterator[str]:
    (n, k), m, family = case["shape"], case["m"], case["family"]
    weight = _weight(case)
    x, bias = _uneven(m, k, dtype), normal(n, seed=6, dtype=dtype)
    wide = torch.cat((x, x), 1)[:, :k]  # rows with a gap between them
    w64 = decoded(weight).double()
    linear, w16 = torch.nn.functional.linear, w64.to(dtype)
    truth = linear(x.double(), w64)
    for one in _forms(family):
        held = one.hold(weight)
        if held is None:
            continue
        run = functools.partial(_forward_once, one, held, x, bias)
        label = f"{one.name}: "
        found = yield from repeated(run, case["runs"], label)
        yield from compared(found, (linear(x, w16, bias),), (truth + bias.double(),), label)
        strided = _forward_once(one, held, wide, None)
        yield from compared(strided, (linear(x, w16),), (truth,), f"strided {label}")
        yield from _edges(one, held, wide, label)
        yield from captured(run, label)
    if family == "multiply":
        yield from _step(weight, x, dtype, case["runs"])


def _forward_once(one: Any, held: Weight4, x: Tensor, bias: Tensor | None) -> Tensors:
    return (one.forward(held, x, bias),)


def _forms(family: str) -> list[Any]:
    if family == "multiply":
        return [Ours()]
    return [route for route in ROUTES if route.way == family]


def _edges(one: Any, held: Weight4, x: Tensor, label: str) -> Iterator[str]:
    """No rows; and a row of NaN, which must be NaN and stay by itself."""
    if one.forward(held, x[:0]).shape != (0, held.out_features):
        yield f"{label}no rows give the wrong shape"
    if len(x) < 2:
        return
    spoilt = x.clone(memory_format=torch.contiguous_format)
    # of the same layout, as a vendor's library may choose another kernel for other strides
    clean = one.forward(held, spoilt)
    spoilt[1] = torch.nan
    y = one.forward(held, spoilt)
    if not bool(y[1].isnan().all()):
        yield f"{label}a row of NaN gives numbers"
    others = torch.arange(len(x), device=x.device) != 1
    if not same_bits(y[others], clean[others]):
        yield f"{label}a row of NaN changes other rows"


def _step(weight: Weight4, x: Tensor, dtype: torch.dtype, runs: int) -> Iterator[str]:
    """Autograd through the public operator."""
    dy = normal(len(x), weight.out_features, seed=7, dtype=dtype)
    w64 = decoded(weight).double()
    held = Ours().hold(weight)
    run = functools.partial(perform, "step", Ours(), held, (x, dy))
    found = yield from repeated(run, runs, "step: ")
    base = perform("step", Dense(dtype), w64.to(dtype), (x, dy))
    truth = (x.double() @ w64.t(), dy.double() @ w64)
    yield from compared(found, base, truth, "step: ")


def _dx(case: Case, dtype: torch.dtype) -> Iterator[str]:
    (n, k), m, family = case["shape"], case["m"], case["family"]
    weight = _weight(case)
    one = Ours() if family == "dx" else next(r for r in ROUTES if f"dx {r.way}" == family)
    held = one.hold(weight)
    dy = _uneven(m, n, dtype)
    w64 = decoded(weight).double()
    wide = torch.cat((dy, dy), 1)[:, :n]  # rows with a gap between them
    truth, base = dy.double() @ w64, dy @ w64.to(dtype)
    run = functools.partial(_dx_once, one, held, dy)
    found = yield from repeated(run, case["runs"])
    yield from compared(found, (base,), (truth,))
    yield from compared(_dx_once(one, held, wide), (base,), (truth,), "strided ")
    if one.dx(held, dy[:0]).shape != (0, k):
        yield "no rows give the wrong shape"
    yield from captured(run, family)


def _dx_once(one: Any, held: Weight4, dy: Tensor) -> Tensors:
    return (one.dx(held, dy),)


def _lora(case: Case, dtype: torch.dtype) -> Iterator[str]:
    (n, k), m = case["shape"], case["m"]
    weight = _weight(case)
    held = Ours().hold(weight)
    x, dy = _uneven(m, k, dtype), normal(m, n, seed=7, dtype=dtype)
    lora = random_lora(n, k, m, mixed=case["family"] == "mixed")
    run = functools.partial(perform, "lora step", Ours(), held, (x, dy, lora))
    found = yield from repeated(run, case["runs"])
    w64 = decoded(weight).double()
    base, truth = (_lora_by_hand(w, x, dy, lora) for w in (w64.to(dtype), w64))
    yield from compared(found, base, truth)
    none = Lora(lora.a, torch.zeros_like(lora.b), lora.scaling, lora.rows)
    if not torch.equal(Ours().lora(held, x, none), Ours().forward(held, x)):
        yield "an update of zero changes the output"
    nobody = Lora(lora.a, lora.b, lora.scaling, None if lora.rows is None else lora.rows[:0])
    if Ours().lora(held, x[:0], nobody).shape != (0, n):
        yield "no rows give the wrong shape"
    yield from captured(lambda: (Ours().lora(held, x, lora),), case["family"])


def _lora_by_hand(w: Tensor, x: Tensor, dy: Tensor, lora: Lora) -> Tensors:
    """y, dx, dA, dB in the dtype of w, the matrices cast to it."""
    cast = [t.to(w.dtype).requires_grad_() for t in (x.detach().clone(), lora.a, lora.b)]
    x, a, b = cast
    y = x @ w.t()
    for i, s in enumerate(lora.scaling.tolist()):
        part = (x @ a[i].t()) @ b[i].t() * s
        y = y + (part if lora.rows is None else part * (lora.rows == i)[:, None])
    return y.detach(), *torch.autograd.grad(y, cast, dy.to(w.dtype))


def _beyond_32_bits(case: Case, n: int, k: int, dtype: torch.dtype) -> Iterator[str]:
    """More than 2^31 weights: the last rows of W, which a 32-bit offset does not reach."""
    tail, family = 128, case["family"]
    if family == "quantize":
        w = torch.randn(n, k, dtype=dtype, device=device())
        whole, alone = Ours().quantize(w), Ours().quantize(w[-tail:])
        if not torch.equal(whole.codes[-tail * k // 2 :], alone.codes):
            yield "the last codes differ from those of the last rows alone"
        return
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device=device())
    scales = 0.02 * torch.rand(n * k // 64, device=device())
    table = codebook("nf4").table(device())
    weight = Ours().hold(Weight4(codes, scales, table, n, k, 64))
    last = Weight4(codes[-tail * k // 2 :], scales[-tail * k // 64 :], table, tail, k, 64)
    w = decoded(last)
    if family == "expand":
        out = torch.empty(n, k, dtype=dtype, device=device())
        if not torch.equal(Ours().expand(weight, out)[-tail:], w.to(dtype)):
            yield "the last values differ from table times scale"
    elif family == "dx":
        dy = torch.zeros(case["m"], n, dtype=dtype, device=device())
        dy[:, -tail:] = normal(case["m"], tail, seed=8, dtype=dtype)
        truth = dy[:, -tail:].double() @ w.double()
        found = (Ours().dx(weight, dy),)
        yield from compared(found, (dy[:, -tail:] @ w.to(dtype),), (truth,))
    else:
        x = normal(case["m"], k, seed=8, dtype=dtype)
        route = next(r for r in ROUTES if r.way == family)
        found = (route.forward(weight, x)[:, -tail:],)
        yield from compared(found, (x @ w.to(dtype).t(),), (x.double() @ w.double().t(),))


def _weight(case: Case) -> Weight4:
    n, k = case["shape"]
    return random_weight(n, k, case["nested"], case.get("code", "nf4"), case.get("block_size", 64))


def _uneven(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows from 1/16 to 16 in size, one of them zeros, with an outlier here and there."""
    x = normal(m, k, seed=3)
    x *= 2.0 ** (torch.arange(m, device=x.device) % 9 - 4)[:, None]
    x[0, k // 2] = 500.0
    if m > 2:
        x[2] = 0
    return x.to(dtype)
