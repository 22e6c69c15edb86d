"""Every C operator on tensors that begin or end where memory does; a program of its own.

test_native_sanitizers.py runs it with a library that was built to report what it must not do.

AddressSanitizer alone is not enough. It checks what the compiler sees as a load or a store, and to
gcc a masked load, a gather and a store past the caches are calls that it knows nothing of. So each
case runs three times: on the heap, where the sanitizer watches; then on pages of its own, with the
end of each tensor against a page that nobody may touch, and with its beginning against one. What
operators allocate lies there too, and holds NaN until it is written.

    run      all cases, compared with the definition, so that nothing goes unwritten; and the heap
             has to be as full after many calls as before
    plant    the proof that `run` can fail: each tensor in turn ends an element too early, and a
             forked child that uses it has to die
    glance   a part of that: a fork takes long under the sanitizer
"""

import contextlib
import ctypes
import functools
import mmap
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels import adamw8, scales4
from lora_kernels import blockwise4_reference as reference
from lora_kernels.cpu import adamw8 as cpu_adamw8
from lora_kernels.cpu import blockwise4, library, matmul4, quantize4, toolchain
from lora_kernels.cpu import cross_entropy as cpu_cross_entropy
from lora_kernels.cpu import dropout as cpu_dropout
from lora_kernels.cpu import rms_norm as cpu_rms_norm
from lora_kernels.cpu import rotary as cpu_rotary
from lora_kernels.cpu import swiglu as cpu_swiglu
from lora_kernels.cross_entropy import Grading, columns_reference, rows_reference
from lora_kernels.dropout import drop_reference
from lora_kernels.operands import Weight4
from lora_kernels.rms_norm import backward_reference, rms_norm_reference
from lora_kernels.rotary import rotary_reference
from lora_kernels.swiglu import gradients_reference, swiglu_reference

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)
THREADS = 3
PLACES = ("heap", "end", "beginning")
PROCESS = ctypes.CDLL(None)
PROCESS.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
PROCESS.__asan_poison_memory_region.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
PROCESS.__sanitizer_get_current_allocated_bytes.restype = ctypes.c_size_t


class Case(NamedTuple):
    """An operator, the tensors that it is called with, and what it has to give."""

    name: str
    call: Callable[..., tuple[Tensor, ...]]
    tensors: dict[str, Tensor]
    wanted: tuple[Tensor, ...]
    bound: Tensor | None = None  # of the error; None: bit for bit


EMPTY = torch.empty


def allocate(
    place: str, numel: int, dtype: torch.dtype, torn: bool = False, odd: bool = False
) -> Tensor:
    """Memory full of NaN.

    Args:
        place: one of `PLACES`.
        numel: elements.
        dtype: of each.
        torn: its last element, or first at a beginning, is out of bounds.
        odd: on the heap, at an odd address.
    """
    size, item = numel * dtype.itemsize, dtype.itemsize
    if not size:
        return EMPTY(0, dtype=dtype)
    if place == "heap":
        skipped = 1 if odd else item  # never at the start of a vector
        memory = EMPTY(skipped + size, dtype=torch.uint8)  # not a byte more, as torch has it
        out = torch.frombuffer(memory.numpy(), dtype=dtype, count=numel, offset=skipped)
        within(out, place, torn).view(torch.uint8).fill_(255)
        if torn:
            PROCESS.__asan_poison_memory_region(out.data_ptr() + size - 1, 1)
        return out
    page = mmap.PAGESIZE
    inner = -(-size // page) * page
    pages = mmap.mmap(-1, inner + 2 * page)
    start = page + (inner - size if place == "end" else 0)
    if torn:
        start += item if place == "end" else -item
    out = torch.frombuffer(pages, dtype=dtype, count=numel, offset=start)
    within(out, place, torn).view(torch.uint8).fill_(255)
    first = out.data_ptr() - start
    for wall in (first, first + page + inner):
        assert PROCESS.mprotect(wall, page, 0) == 0  # PROT_NONE
    return out


def within(t: Tensor, place: str, torn: bool) -> Tensor:
    """What of a flat tensor is in bounds."""
    if not torn:
        return t
    return t[1:] if place == "beginning" else t[:-1]


def put(place: str, t: Tensor, torn: bool = False) -> Tensor:
    """A copy of a tensor that is given to an operator: one from a file may lie anywhere."""
    out = allocate(place, t.numel(), t.dtype, torn, odd=True)
    within(out, place, torn).copy_(within(t.reshape(-1), place, torn))
    return out.view(t.shape)


class Place:
    """While it is entered, what operators allocate lies there too.

    Attributes:
        made: how many tensors were allocated.
        torn: which of them is to end too early; None: none.
    """

    def __init__(self, name: str, torn: int | None = None) -> None:
        self.name, self.made, self.torn = name, 0, torn
        self.usual = torch.empty, torch.Tensor.new_empty

    def empty(self, *size: object, dtype: torch.dtype, device: object = None) -> Tensor:
        shape = torch.Size(size[0] if isinstance(size[0], list | tuple) else size)  # type: ignore
        out = allocate(self.name, shape.numel(), dtype, self.made == self.torn)
        self.made += 1
        return out.view(shape)

    def __enter__(self) -> "Place":
        torch.empty = self.empty  # type: ignore[assignment]
        torch.Tensor.new_empty = lambda t, *size: self.empty(*size, dtype=t.dtype)  # type: ignore
        return self

    def __exit__(self, *_: object) -> None:
        torch.empty, torch.Tensor.new_empty = self.usual  # type: ignore[method-assign]


def quantize_case(dtype: torch.dtype, n: int, block: int) -> Case:
    x = torch.randn(n).to(dtype)
    x[: n // 3] = 0  # some blocks of zeros
    table, flag = torch.linspace(-1, 1, 16), torch.zeros(1, dtype=torch.int32)

    def call(x: Tensor, table: Tensor, flag: Tensor) -> tuple[Tensor, ...]:
        return (*quantize4.quantize(x, table, block, flag), flag)

    wanted = (*reference.quantize(x, table, block, flag), flag)
    tensors = {"x": x, "table": table, "flag": flag}
    return Case(f"quantize {dtype} {n} in {block}", call, tensors, wanted)


def encode_case(n: int) -> Case:
    scales, table = torch.rand(n), torch.linspace(-1, 1, 256)
    offset = float(scales.mean()) if n else 0.0

    def call(scales: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        return quantize4.encode_scales(scales, offset, table)

    os.environ["LORA_KERNELS"] = "reference"
    wanted = scales4.encode_scales(scales, table)[:2]
    os.environ["LORA_KERNELS"] = "native"
    return Case(f"encode {n}", call, {"scales": scales, "table": table}, wanted)


def weight_of(n: int, k: int, block: int, nested: bool) -> dict[str, Tensor]:
    """The tensors of a `Weight4`, by their names."""
    blocks = -(-n * k // block)
    codes = torch.randint(0, 256, ((n * k + 1) // 2,), dtype=torch.uint8)
    weight = {"codes": codes, "table": torch.linspace(-1, 1, 16)}
    if not nested:
        return {**weight, "scales": torch.rand(blocks) + 0.5}
    scales = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
    scales[::2], scales[1::4] = 255, 0  # both ends of the table are read
    return {
        **weight,
        "scales": scales,
        "scale_absmax": torch.rand(-(-blocks // scales4.SCALE_GROUP)) + 0.5,
        "scale_offset": torch.tensor(0.25),
        "scale_table": torch.linspace(-1, 1, 256),
    }


def expand_case(dtype: torch.dtype, n: int, block: int, nested: bool, stream: bool) -> Case:
    tensors = weight_of(1, n, block, nested)

    def call(**t: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty(n, dtype=dtype)
        w = Weight4(out_features=1, in_features=n, block_size=block, **t)
        blockwise4.expand(w.codes, w.scales, w.table, block, w.nested, out, stream)
        return (out,)

    w = Weight4(out_features=1, in_features=n, block_size=block, **tensors)
    wanted = torch.empty(n, dtype=dtype)
    reference.dequantize(w.codes, w.scales, w.table, block, w.nested, wanted)
    name = f"expand {dtype} {n} in {block}, nested {nested}, stream {stream}"
    return Case(name, call, tensors, (wanted,))


def slice_case(
    dtype: torch.dtype, shape: tuple[int, int], block: int, box: tuple[int, ...], nested: bool
) -> Case:
    tensors = weight_of(*shape, block, nested)
    size = (box[1] - box[0], box[3] - box[2])

    def call(**t: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty(size, dtype=dtype)
        w = Weight4(out_features=shape[0], in_features=shape[1], block_size=block, **t)
        blockwise4.expand_slice(w, *box, out)
        return (out,)

    w = Weight4(out_features=shape[0], in_features=shape[1], block_size=block, **tensors)
    wanted = torch.empty(size, dtype=dtype)
    reference.expand_slice(w, *box, wanted)
    return Case(f"slice {box} of {shape} {dtype} in {block}", call, tensors, (wanted,))


def product_case(
    dtype: torch.dtype, m: int, shape: tuple[int, int], block: int, nested: bool, bias: bool
) -> Case:
    n, k = shape
    tensors = {**weight_of(n, k, block, nested), "x": torch.randn(m, k).to(dtype)}
    if bias:
        tensors["bias"] = torch.randn(n)

    def call(x: Tensor, bias: Tensor | None = None, **t: Tensor) -> tuple[Tensor, ...]:
        w = Weight4(out_features=n, in_features=k, block_size=block, **t)
        return (matmul4.multiply(x, w, bias),)

    w, x, zero = dense(tensors, n, k, block), tensors["x"].double(), torch.zeros(n)
    added = tensors.get("bias", zero).double()
    wanted, largest = x @ w.t() + added, x.abs() @ w.abs().t() + added.abs()
    name = f"{m} rows times {shape} {dtype} in {block}, nested {nested}, bias {bias}"
    return Case(name, call, tensors, (wanted.to(dtype),), 4 * torch.finfo(dtype).eps * largest)


def dx_case(dtype: torch.dtype, m: int, shape: tuple[int, int], block: int, nested: bool) -> Case:
    n, k = shape
    tensors = {**weight_of(n, k, block, nested), "dy": torch.randn(m, n).to(dtype)}

    def call(dy: Tensor, **t: Tensor) -> tuple[Tensor, ...]:
        return (
            matmul4.multiply_dx(dy, Weight4(out_features=n, in_features=k, block_size=block, **t)),
        )

    w, dy = dense(tensors, n, k, block), tensors["dy"].double()
    bound = 4 * torch.finfo(dtype).eps * (dy.abs() @ w.abs())
    return Case(
        f"{m} rows back through {shape} {dtype} in {block}",
        call,
        tensors,
        ((dy @ w).to(dtype),),
        bound,
    )


def adamw8_case(n: int) -> Case:
    made = {"p": torch.randn(n), "g": torch.randn(n)}
    moments = adamw8.no_moments(made["p"])
    moments.mean.random_(-127, 128), moments.root.random_(0, 256)
    moments.mean_unit.uniform_(), moments.root_unit.uniform_()
    tensors = {**made, **moments._asdict()}
    factors = adamw8.Factors(0.9, 0.9, 0.1, 0.999, 0.001, 2.0, 1e-8, 1e-2)

    def call(p: Tensor, g: Tensor, **state: Tensor) -> tuple[Tensor, ...]:
        cpu_adamw8.step([p], [g], [adamw8.Moments8(**state)], factors, 5)
        return (p, *state.values())

    wanted = {name: t.clone() for name, t in tensors.items()}
    p, g, *state = wanted.values()
    adamw8.adamw8_reference([p], [g], [adamw8.Moments8(*state)], factors, 5)
    return Case(f"a step on {n} elements", call, tensors, (p, *state))


def grade_case(dtype: torch.dtype, n: int, columns: int, capped: bool, rows: bool) -> Case:
    """Rows of logits, or some columns of wider ones."""
    grading, first = Grading(5.0 if capped else None, 0.7, 0.1), 0 if rows else 3
    targets = torch.randint(0, columns, (n,))
    tensors = {"logits": torch.randn(n, columns).to(dtype), "targets": targets}

    def call(logits: Tensor, targets: Tensor, **norms: Tensor) -> tuple[Tensor, ...]:
        if rows:
            return (*cpu_cross_entropy.grade_rows(logits, targets, grading, True), logits)
        cpu_cross_entropy.grade_columns(logits, targets, norms["norms"], 3, columns + 9, grading)
        return (logits,)

    exact = tensors["logits"].double()
    if rows:
        found = rows_reference(exact, targets, grading, True)
        wanted = (*(t.float() for t in found), exact.to(dtype))
    else:
        tensors["norms"] = torch.rand(n, 2) + 1
        norms = tensors["norms"].double()
        columns_reference(exact, targets, norms, first, columns + 9, grading)
        wanted = (exact.to(dtype),)
    bound = torch.tensor(columns * 2.0**-18 + 20 * torch.finfo(dtype).eps)
    name = f"grade {n} x {columns} {dtype}, capped {capped}, rows {rows}"
    return Case(name, call, tensors, wanted, bound)


def dense(tensors: dict[str, Tensor], n: int, k: int, block: int) -> Tensor:
    """W as it is defined: products in float32; given in float64, to multiply by."""
    decoders = ("scale_absmax", "scale_offset", "scale_table")
    scales = scales4.decode_scales(tensors["scales"], *(tensors.get(d) for d in decoders))
    pairs = torch.stack((tensors["codes"] >> 4, tensors["codes"] & 15), 1).view(-1)[: n * k]
    values = tensors["table"][pairs.long()]
    return (values * scales.repeat_interleave(block)[: n * k]).double().view(n, k)


def grade_cases() -> Iterator[Case]:
    for dtype in (*HALVES, torch.float32):
        for n, columns in ((0, 5), (1, 1), (2, 31), (3, 64), (2, 1025), (9, 3000)):
            for capped, rows in ((False, True), (True, True), (False, False)):
                yield grade_case(dtype, n, columns, capped, rows)


def norm_case(dtype: torch.dtype, m: int, h: int, gap: int, rounds: bool) -> Case:
    out = dtype if rounds else torch.float32
    x, weight = torch.randn(m, h + gap).to(dtype), torch.rand(h) + 0.5
    dy = torch.randn(m, h).to(out)

    def call(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        some = x[:, gap:]  # rows that lie apart
        y = cpu_rms_norm.forward(some, weight, 1e-5, rounds, out)
        dx, dw = cpu_rms_norm.backward(dy, some, weight, 1e-5, rounds, (True, True))
        assert dx is not None
        assert dw is not None
        return y, dx, dw

    exact = x[:, gap:].double(), weight.double()
    dx, dw = backward_reference(dy.double(), *exact, 1e-5, False, not rounds)
    wanted = (rms_norm_reference(*exact, 1e-5).to(out), dx.to(dtype), dw.float())
    bound = 4 * torch.finfo(dtype).eps * (20 + 5 * m) * torch.ones(())
    tensors = {"x": x, "weight": weight, "dy": dy}
    return Case(f"norm of {m} x {h} {dtype} to {out}", call, tensors, wanted, bound)


def gate_case(dtype: torch.dtype, m: int, columns: int, activation: str) -> Case:
    gate, up, dout = torch.randn(3, m, columns).to(dtype).unbind()

    def call(gate: Tensor, up: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out = cpu_swiglu.forward(gate, up, activation)
        return (out, *cpu_swiglu.backward(dout, gate, up, activation))

    exact = gate.double(), up.double()
    plain = swiglu_reference(*exact, activation)
    found = (plain, *gradients_reference(dout.double(), *exact, activation))
    bound = 4 * torch.finfo(dtype).eps * 30 * torch.ones(())
    tensors = {"gate": gate, "up": up, "dout": dout}
    name = f"{activation} of {m} x {columns} {dtype}"
    return Case(name, call, tensors, tuple(t.to(dtype) for t in found), bound)


def turn_case(dtype: torch.dtype, sizes: tuple[int, ...], turned: int, inverse: bool) -> Case:
    x, angles = torch.randn(sizes).to(dtype), torch.randn(1, 1, sizes[2], turned // 2)

    def call(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty(sizes, dtype=dtype)
        angles = (t.expand(len(x), -1, -1, -1) for t in (cos, sin))
        cpu_rotary.rotate(x, *angles, inverse, out)
        return (out,)

    tables = [torch.cat((t, t), -1) for t in (angles.cos(), angles.sin())]
    wanted = rotary_reference(x, *tables, inverse)
    tensors = {"x": x, "cos": angles.cos(), "sin": angles.sin()}
    return Case(f"{turned} channels of {sizes} {dtype}", call, tensors, (wanted,))


def drop_case(dtype: torch.dtype, m: int, k: int, gap: int) -> Case:
    x, seed, limit = torch.randn(m, k + gap).to(dtype), torch.tensor([-77]), 20_000

    def call(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        return (cpu_dropout.drop(x[:, gap:], seed, limit),)  # rows that lie apart

    wanted = drop_reference(x[:, gap:], seed, limit / 65536)
    return Case(f"drop of {m} x {k} {dtype}", call, {"x": x, "seed": seed}, (wanted,))


def layer_cases() -> Iterator[Case]:
    """What a decoder layer has beside its products."""
    for dtype in (*HALVES, torch.float32):
        for m, h in ((0, 5), (1, 1), (3, 31), (2, 64), (5, 257), (70, 1000)):
            yield norm_case(dtype, m, h, gap=0, rounds=True)
            yield norm_case(dtype, m, h, gap=3, rounds=False)
            yield drop_case(dtype, m, h, gap=m)
            for activation in ("silu", "gelu_tanh"):
                yield gate_case(dtype, m, h, activation)
        yield gate_case(dtype, 2, 20_003, "silu")
        for sizes, turned in (
            ((0, 1, 1, 4), 4),
            ((1, 1, 1, 2), 2),
            ((2, 3, 5, 40), 34),
            ((1, 2, 3, 129), 128),
            ((2, 5, 70, 64), 64),
        ):
            yield turn_case(dtype, sizes, turned, inverse=turned == 34)


def cases() -> Iterator[Case]:
    """Irregular sizes: nothing, one, partial blocks, odd ends, several pieces for threads."""
    nested, stream = cycle((False, True)), cycle((False, True, True, False))
    sizes = [(n, 64) for n in (0, 1, 2, 31, 63, 64, 65, 127, 129, 1000, 150_001)]
    sizes += [(n, 32) for n in (1, 33, 95, 2049)] + [(n, 4096) for n in (5, 4095, 4096, 9001)]
    for dtype in FLOATS:
        for n, block in sizes:
            yield quantize_case(dtype, n, block)
            for _ in range(2):
                yield expand_case(dtype, n, block, next(nested), next(stream))
        for box in (
            (0, 5, 0, 192),
            (1, 4, 64, 128),
            (4, 5, 128, 192),
            (0, 5, 0, 64),
            (2, 3, 0, 192),
        ):
            yield slice_case(dtype, (5, 192), 64, box, next(nested))
    for n in (0, 1, 2, 255, 256, 257, 1000, 20_003):
        yield encode_case(n)
    yield from layer_cases()
    yield from map(adamw8_case, (0, 1, 255, 256, 257, 1000, 40_003))
    yield from grade_cases()
    matrices = [((1, 32), 32), ((3, 64), 64), ((2, 160), 32), ((5, 192), 64), ((4, 1056), 32)]
    matrices += [
        ((3, 4096), 4096),
        ((2, 8192 + 256), 256),
        ((301, 128), 64),
        ((7, 0), 64),
        ((0, 64), 64),
    ]
    bias = cycle((False, True, False))
    for dtype in (*HALVES, torch.float32):
        for shape, block in matrices:
            for m in (0, 1, 2, 3, 5, 8):
                yield product_case(dtype, m, shape, block, next(nested), next(bias))
    for dtype in FLOATS:  # panels
        yield product_case(dtype, 9, (37, 768), 64, next(nested), next(bias))
        yield dx_case(dtype, 9, (37, 768), 64, next(nested))
        yield dx_case(dtype, 1, (5, 96), 32, next(nested))


def few_cases() -> list[Case]:
    """One of each operator, with all that it may touch."""
    half = torch.bfloat16
    quantize = quantize_case(half, 1001, 64)
    quantize.tensors["x"][70] = torch.inf  # the flag is set
    return [
        quantize,
        encode_case(1000),
        adamw8_case(1000),
        norm_case(half, 3, 101, gap=0, rounds=True),
        drop_case(half, 3, 101, gap=0),
        gate_case(half, 2, 101, "gelu_tanh"),
        turn_case(half, (2, 3, 5, 40), 34, inverse=False),
        expand_case(half, 1001, 64, nested=True, stream=False),
        grade_case(half, 3, 1001, capped=True, rows=True),
        grade_case(torch.float32, 3, 1001, capped=False, rows=False),
        product_case(half, 5, (5, 192), 64, nested=True, bias=True),
    ]


def run_case(case: Case, place: str) -> None:
    with Place(place):
        got = case.call(**{name: put(place, t) for name, t in case.tensors.items()})
    for found, wanted in zip(got, case.wanted, strict=True):
        assert found.shape == wanted.shape, case.name
        assert found.dtype == wanted.dtype, case.name
        if case.bound is None:
            same = torch.equal(
                found.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)
            )
        else:
            same = bool(((found.double() - wanted.double()).abs() <= case.bound).all())
        assert same, "not what the definition gives"


def run() -> None:
    called, function = set(), library.function

    def noted(name: str, *argtypes: object) -> Callable[..., None]:
        called.add(name)
        return function(name, *argtypes)

    library.function = noted  # type: ignore[assignment]
    for case in cases():
        for place in PLACES:
            try:
                run_case(case, place)
            except Exception as error:
                raise AssertionError(f"{case.name}, {place}") from error
    library.function = function
    sources = "".join(path.read_text() for path in toolchain.SOURCES.glob("*.c"))
    assert called == set(re.findall(r"LORA_EXPORT int (\w+)", sources)), called
    for case in few_cases():
        assert not leaked(case), f"{case.name} keeps {leaked(case)} bytes"


def leaked(case: Case) -> int:
    """Bytes of the heap that 20 calls keep."""
    case.call(**case.tensors)
    before = PROCESS.__sanitizer_get_current_allocated_bytes()
    for _ in range(20):
        case.call(**case.tensors)
    return PROCESS.__sanitizer_get_current_allocated_bytes() - before


def dies(call: Callable[[], object]) -> bool:
    """Whether a forked child ends by a report or a signal; what it says is not shown."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(60)
        with contextlib.suppress(BaseException):  # an exception is not what has to happen
            call()
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def plant(cases: slice = slice(None), places: tuple[str, ...] = PLACES) -> None:
    for case in few_cases()[cases]:
        for place in places:
            with Place(place) as counted:
                whole = {name: put(place, t) for name, t in case.tensors.items()}
                call = functools.partial(case.call, **whole)
                assert not dies(call), f"{case.name}, {place}"
                call()
            for output in range(counted.made):
                with Place(place, torn=output):
                    assert dies(call), f"{case.name}, {place}: tensor {output} that it makes"
            for name, t in case.tensors.items():
                if place == "heap" and name == "scale_table":
                    continue  # by gathers on some machines
                torn = {name: put(place, t, torn=True)}
                with Place(place):
                    assert dies(functools.partial(call, **torn)), f"{case.name}, {place}: {name}"


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    matmul4.PANEL_BYTES = 1 << 13  # so that small weights have several
    reason = library.why_not()
    assert reason is None, reason
    glance = functools.partial(plant, slice(0, None, 3), ("end",))
    for chosen in sys.argv[1:]:
        {"run": run, "plant": plant, "glance": glance}[chosen]()
