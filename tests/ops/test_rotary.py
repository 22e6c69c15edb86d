"""Rotary embedding in every backend: bits, gradients, layouts, what is kept, and the compiler."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_kernels import rotary
from lora_kernels.rotary import rotary_reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OP = torch.ops.lora_kernels.rotary


# everything below holds for every backend
pytestmark = pytest.mark.usefixtures("backend")


def angles(batch: int, tokens: int, turned: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines as the models make them: the angles twice."""
    angle = 10 * torch.randn(batch, 1, tokens, turned // 2)
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def by_hand(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What the decoder computed before there was an operator."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


@given(
    sizes=st.tuples(*(st.integers(0, 3) for _ in range(2)), st.sampled_from([0, 1, 5])),
    half=st.sampled_from([0, 1, 3, 8, 17, 64]),
    rest=st.sampled_from([0, 1, 4]),
    shared=st.booleans(),
    transposed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_definition_to_the_bit(
    sizes: tuple[int, int, int],
    half: int,
    rest: int,
    shared: bool,
    transposed: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    (b, h, t), d = sizes, 2 * half + rest
    x = torch.randn(b, h, t, d).to(dtype)
    if transposed:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = angles(1 if shared else b, t, 2 * half)
    ours = rotary(x, cos, sin)
    assert ours.stride() == torch.empty_like(x).stride()
    wide = by_hand(x[..., : 2 * half].to(torch.promote_types(dtype, torch.float32)), cos, sin)
    assert same_bits(ours[..., : 2 * half], wide.to(dtype))
    assert same_bits(ours[..., 2 * half :], x[..., 2 * half :])
    back = OP(ours.double(), cos, sin, True)  # in float64: the inverse of what was rounded
    assert (
        (back - x.double()).abs().max()
        <= 1e-6 + 2 * float(torch.finfo(dtype).eps) * x.double().abs().max()
        if x.numel()
        else True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_the_rotation_back(dtype: torch.dtype) -> None:
    x, dy = torch.randn(2, 3, 5, 12).to(dtype).requires_grad_(), torch.randn(2, 3, 5, 12).to(dtype)
    cos, sin = angles(1, 5, 8)
    y = rotary(x, cos, sin)
    runs = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2)]
    assert same_bits(*runs)
    assert same_bits(runs[0], rotary_reference(dy, cos, sin, inverse=True))
    wide = x.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    (truth,) = torch.autograd.grad(rotary_reference(wide, cos, sin), wide, dy.to(wide.dtype))
    assert same_bits(runs[0], truth.to(dtype))


def test_derivatives_of_any_order() -> None:
    x = torch.randn(1, 1, 2, 5, dtype=torch.float64).requires_grad_()
    cos, sin = angles(1, 2, 4)
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: rotary(x, cos, sin) ** 2, x, fast_mode=True)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_layout_is_read_where_it_lies(dtype: torch.dtype) -> None:
    base = torch.randn(2, 3, 5, 12).to(dtype)
    cos, sin = angles(2, 5, 8)
    wanted = rotary(base, cos, sin)
    assert wanted.isfinite().all()
    gaps = torch.full((2, 5, 9, 20), torch.nan).to(dtype)
    gaps[:, :, 2:5, 4:16] = base.transpose(1, 2)
    inside = gaps[:, :, 2:5, 4:16].transpose(1, 2)  # as q within one product for q, k and v
    for x in (inside, base.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)):
        assert same_bits(rotary(x, cos, sin), wanted)
    wide = [torch.stack((t, torch.full_like(t, torch.nan)), -1)[..., 0] for t in (cos, sin)]
    assert same_bits(rotary(base, *wide), wanted)
    wide = [torch.cat((t, torch.full_like(t, torch.nan)), -1)[..., :8] for t in (cos, sin)]
    assert same_bits(rotary(base, *wide), wanted)
    y = rotary(x := base.clone().requires_grad_(), cos, sin)
    y.sum().backward()  # of a gradient that is expanded
    assert same_bits(x.grad, rotary_reference(torch.ones_like(base), cos, sin, inverse=True))


def test_cosines_and_sines_are_all_that_is_kept() -> None:
    x = torch.randn(2, 3, 5, 8).requires_grad_()
    cos, sin = angles(1, 5, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rotary(x, cos, sin)
    assert {t.data_ptr() for t in kept} == {cos.data_ptr(), sin.data_ptr()}


def test_many_heads_and_tokens_by_any_number_of_threads(backend: str) -> None:
    x = torch.randn(2, 7, 60, 64).bfloat16().transpose(1, 2).contiguous().transpose(1, 2)
    cos, sin = angles(2, 60, 64)
    wanted = by_hand(x.float(), cos, sin).bfloat16()
    for threads in (1, 3) if backend == "native" else (1,):
        torch.set_num_threads(threads)
        try:
            assert same_bits(rotary(x, cos, sin), wanted)
        finally:
            torch.set_num_threads(1)


def test_opcheck() -> None:
    x = torch.randn(2, 5, 3, 12).transpose(1, 2).requires_grad_()
    for batch in (1, 2):
        torch.library.opcheck(OP.default, (x, *angles(batch, 5, 8), False))
    torch.library.opcheck(OP.default, (x.detach()[:, 1:, ::2], *angles(1, 3, 12), True))


def test_it_compiles_in_one_graph() -> None:
    x, (cos, sin) = torch.randn(2, 5, 3, 8).transpose(1, 2), angles(1, 5, 8)
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    found = []
    for turn in (compiled, rotary):
        own = x.detach().requires_grad_()
        y = turn(own, cos, sin)
        y.square().sum().backward()
        found.append((y, own.grad))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


GOOD: Callable[[], dict[str, Tensor]] = lambda: dict(  # noqa: E731
    zip(("x", "cos", "sin"), (torch.ones(2, 3, 5, 8), *angles(1, 5, 8)), strict=True)
)


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"x": torch.ones(2, 3, 5, 8).int()}, TypeError, "x must be floating-point; got"),
        ({"cos": torch.ones(1, 1, 5, 8).half()}, TypeError, "cos and sin must be float32; got"),
        ({"x": torch.ones(3, 5, 8)}, ValueError, r"x must be \(B, H, T, D\); got \(3, 5, 8\)"),
        ({"cos": torch.ones(1, 1, 4, 8)}, ValueError, r"must be \(2 or 1, 1, 5, R\)"),
        ({"sin": torch.ones(1, 1, 5, 6)}, ValueError, r"got \(1, 1, 5, 8\) and \(1, 1, 5, 6\)"),
        ({"x": torch.ones(2, 3, 5, 6)}, ValueError, "even and at most 6; got 8"),
        ({"x": torch.ones(2, 3, 5, 8, device="meta")}, ValueError, "x is on meta, cos on cpu"),
        ({"sin": torch.ones(1, 1, 5, 8).requires_grad_()}, ValueError, "take no gradient"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        rotary(**(GOOD() | change))
    odd = angles(1, 5, 6)
    with pytest.raises(ValueError, match="even and at most 8; got 3"):
        rotary(torch.ones(2, 3, 5, 8), *(t[..., :3] for t in odd))
