"""`check_adapter` passes a right layer and fails each planted fault."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_core.testing import check_adapter


class Plain(nn.Module):
    """A LoRA layer as a user might write it: merges in place, keeps the original for unmerging."""

    def __init__(
        self, base: nn.Linear, r: int = 4, alpha: float = 12, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, base.in_features) / 8)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        self.scaling, self.dropout = alpha / r, dropout
        self.enabled = True
        self.kept: Tensor | None = None

    def delta_weight(self) -> Tensor:
        return self.scaling * (self.B @ self.A)

    def update(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return self.scaling * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            weight = self.base.weight if self.kept is None else self.kept
            return F.linear(x, weight, self.base.bias)
        return self.base(x) if self.kept is not None else self.base(x) + self.update(x)

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return state if self.kept is None else state | {"base.weight": self.kept}

    @torch.no_grad()
    def merge(self) -> None:
        if self.kept is None:
            self.kept = self.base.weight.clone()
            merged = self.kept.float() + self.delta_weight()
            self.base.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        self.base.weight.copy_(self.kept)
        self.kept = None


class ScaleDroppedInForward(Plain):
    def update(self, x):
        return super().update(x) / self.scaling


class ScaleDroppedInMerge(Plain):
    def delta_weight(self):
        return self.B @ self.A


class ScaleSlightlyOffInMerge(Plain):
    """One part in ten thousand, far below the tolerances in common use."""

    def merge(self):
        with torch.no_grad():
            super().merge()
            self.base.weight.copy_(self.kept.float() + 1.0001 * self.delta_weight())


class Swapped(Plain):
    """A and B change places, which fits where N = K: the update is transposed."""

    def update(self, x):
        return self.scaling * F.linear(F.linear(x, self.B.T.to(x.dtype)), self.A.T.to(x.dtype))


class SwappedMerge(Plain):
    def merge(self):
        with torch.no_grad():
            super().merge()
            self.base.weight.copy_(self.kept.float() + self.delta_weight().T)


class MergedTwice(Plain):
    """A merged layer still adds the update."""

    def forward(self, x):
        y = super().forward(x)
        return y + self.update(x) if self.enabled and self.kept is not None else y


class SecondMergeAdds(Plain):
    def merge(self):
        with torch.no_grad():
            if self.kept is None:
                super().merge()
            else:
                self.base.weight += self.delta_weight().to(self.base.weight.dtype)


class DropoutInEval(Plain):
    def update(self, x):
        return super().update(F.dropout(x, 0.3, training=True))


class UnmergeSubtracts(Plain):
    def unmerge(self):
        with torch.no_grad():
            self.base.weight -= self.delta_weight().to(self.base.weight.dtype)
            self.kept = None


class MergeRoundsTwice(Plain):
    """The update is rounded before the sum is: the fault of PEFT's safe merge, enlarged."""

    def merge(self):
        with torch.no_grad():
            super().merge()
            rounded = self.delta_weight().to(torch.float8_e4m3fn).float()
            self.base.weight.copy_(self.kept.float() + rounded)


class BaseTrainable(Plain):
    def __init__(self, base):
        super().__init__(base)
        self.base.requires_grad_(True)


class DisableLeavesUpdate(Plain):
    def forward(self, x):
        return super().forward(x) if self.enabled else self.base(x) + self.update(x)


class DisableForgets(Plain):
    """Enabling again does not bring the adapter back."""

    def forward(self, x):
        if not self.enabled:
            self.scaling = 0.0
        return super().forward(x)


class NotIdentity(Plain):
    def __init__(self, base):
        super().__init__(base)
        nn.init.constant_(self.B, 1e-3)


class Detached(Plain):
    """No gradient reaches A."""

    def update(self, x):
        return self.scaling * F.linear(F.linear(x, self.A.detach().to(x.dtype)), self.B.to(x.dtype))


class InputGradientHalved(Plain):
    def forward(self, x):
        return super().forward(x.detach() + (x - x.detach()) / 2)


class WrongGradient(Plain):
    """The forward pass is right, the gradient is that without the scaling."""

    def update(self, x):
        out = super().update(x)
        return out.detach() + (out - out.detach()) / self.scaling


class NotSaved(Plain):
    """What is saved is the start, not the state."""

    def state_dict(self, *args, **kwargs):
        return super().state_dict(*args, **kwargs) | {"B": torch.zeros_like(self.B)}


FAULTS = {
    ScaleDroppedInForward: r"the output in eval is .*; it should be x \(W \+ dW\)\^T \+ b",
    ScaleDroppedInMerge: r"delta_weight\(\) is .*; it should be scaling",
    ScaleSlightlyOffInMerge: "the merged output is",
    Swapped: "the output in eval is",
    SwappedMerge: "the merged output is",
    MergedTwice: "the merged output is",
    SecondMergeAdds: "merging twice adds the update twice",
    DropoutInEval: "dropout is on",
    UnmergeSubtracts: "unmerging does not restore the base bit for bit: weight",
    MergeRoundsTwice: "the merged output is",
    BaseTrainable: "parameters of the base are trainable: weight",
    DisableLeavesUpdate: "disabled layer's output is not the base's",
    DisableForgets: "disabling and enabling changes",
    NotIdentity: "a new adapter changes the base's output",
    Detached: "no gradient reaches A",
    InputGradientHalved: "the gradient of the input is",
    NotSaved: "a new layer that loads the state_dict differs",
    WrongGradient: "the gradient of A is",
}


def square(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(24, 24, bias=bias, dtype=dtype)


def test_a_layer_of_the_users_passes():
    check_adapter(Plain, square())
    check_adapter(lambda base: Plain(base, r=1, dropout=0.2), nn.Linear(33, 7, bias=False))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught(fault):
    with pytest.raises(AssertionError, match=FAULTS[fault]) as caught:
        check_adapter(fault, square())
    assert "smallest failing case: AdapterCase(lead=" in str(caught.value)


def test_a_fault_is_caught_in_16_bits_alone():
    for fault in (ScaleDroppedInForward, Swapped, MergedTwice, WrongGradient):
        with pytest.raises(AssertionError, match=FAULTS[fault]):
            check_adapter(fault, square(), dtypes=[torch.bfloat16])


def test_the_smallest_case_is_small():
    with pytest.raises(AssertionError, match=r"lead=\(\), dtype=torch.float32, input_scale=1.0"):
        check_adapter(ScaleDroppedInForward, square())


def test_the_base_and_the_generator_are_left_alone():
    base = square()
    before, state = copy.deepcopy(base.state_dict()), torch.get_rng_state()
    check_adapter(Plain, base, examples=3)
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    assert base.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_an_exception_counts_as_a_failure():
    class Raises(Plain):
        def forward(self, x):
            if x.dim() == 1:
                raise RuntimeError("no vectors here")
            return super().forward(x)

    with pytest.raises(AssertionError, match=r"raised RuntimeError: no vectors here\nsmallest"):
        check_adapter(Raises, square())


def test_a_layer_that_answers_at_random_is_said_to():
    class Moody(Plain):
        calls = 0

        def forward(self, x):
            Moody.calls += 1
            return super().forward(x) + (Moody.calls == 40)

    with pytest.raises(AssertionError, match="fails on some calls and passes on others"):
        check_adapter(Moody, square())


def test_what_the_layer_lacks_is_named():
    class NoDelta(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.gate = base.requires_grad_(False), nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return self.base(x) * (1 + self.gate)

    with pytest.raises(AssertionError, match=r"NoDelta has no delta_weight\(\) and is no host"):
        check_adapter(NoDelta, square())
    with pytest.raises(AssertionError, match="NoDelta has no attribute `enabled`"):
        check_adapter(NoDelta, square(), mergeable=False)
    with pytest.raises(AssertionError, match=r"merge\(\) does not refuse"):
        check_adapter(Plain, square(), mergeable=False)


def test_examples_must_be_positive():
    with pytest.raises(ValueError, match="examples must be at least 1, got 0"):
        check_adapter(Plain, square(), examples=0)
