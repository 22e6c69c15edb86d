"""quantize_model and dequantize_model."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_core.quant import NF4Linear, dequantize_model, quantize_model


class Model(nn.Module):
    """An embedding, two blocks of linear layers, an output head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64, bias=False)})
            for _ in range(2)
        )
        self.head = nn.Linear(64, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for block in self.blocks:
            h = h + block["down"](block["up"](h).relu())
        return self.head(h)


EVERY = tuple(f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down"))


def kinds(model: nn.Module) -> dict[str, type]:
    wanted = (nn.Linear, NF4Linear)
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, wanted)}


def test_every_linear_layer_but_the_head() -> None:
    model = Model()
    report = quantize_model(model)
    assert report.modules == EVERY
    assert report.kept == {"head": "the output head"}
    assert kinds(model) == {**dict.fromkeys(EVERY, NF4Linear), "head": nn.Linear}
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert (
        report.bytes_after
        == size
        < report.bytes_before
        == 4 * sum(p.numel() for p in Model().parameters())
    )
    assert "4 linear layers are 4-bit now" in str(report)
    assert "kept dense: head (the output head)" in str(report)
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, 50)


def test_options_reach_the_layers() -> None:
    model = Model().eval()
    quantize_model(model, code="int4", block_size=32, double_quant=False)
    layer = model.blocks[0]["up"]
    assert (layer.code, layer.block_size, layer.double_quant) == ("int4", 32, False)
    assert not layer.training


@pytest.mark.parametrize(
    "skip", [["down"], r"blocks\.\d\.down", lambda name, module: name.endswith("down")]
)
def test_skip_takes_every_form_of_targets(skip: object) -> None:
    report = quantize_model(Model(), skip=skip)
    assert report.modules == ("blocks.0.up", "blocks.1.up")
    assert report.kept["blocks.0.down"] == "skipped"


def test_a_pattern_of_skip_that_matches_nothing() -> None:
    model = Model()
    with pytest.raises(ValueError, match="skip: 'dwon' matches no module; nearest names: 'down'"):
        quantize_model(model, skip=["dwon"])
    assert set(kinds(model).values()) == {nn.Linear}


def test_tied_weights_stay_tied() -> None:
    model = Model(tied=True)
    model.get_output_embeddings = lambda: None
    report = quantize_model(model)
    assert report.kept == {"head": "its weight is shared with another module"}
    assert model.head.weight is model.embed.weight
    twins = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64), "c": nn.Linear(64, 4)})
    twins["b"].weight = twins["a"].weight
    assert quantize_model(twins).modules == ("c",)


def test_one_layer_in_two_places_stays_one_layer() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "c": nn.Linear(64, 64)})
    model["b"] = model["a"]
    report = quantize_model(model)
    assert report.modules == ("a", "c")
    assert model["a"] is model["b"]
    assert isinstance(model["b"], NF4Linear)
    assert dequantize_model(model) == ["a", "c"]
    assert model["a"] is model["b"]


class Host(nn.Module):
    """A stand-in for an adapter's host."""

    wraps = "base"

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base


def test_inside_a_host() -> None:
    model = nn.Sequential(Host(nn.Linear(64, 64)), nn.Linear(64, 64))
    assert quantize_model(model).modules == ("0", "1")
    assert isinstance(model[0], Host)
    assert isinstance(model[0].base, NF4Linear)
    assert dequantize_model(model) == ["0", "1"]
    assert type(model[0].base) is nn.Linear


def test_a_subclass_is_left_alone() -> None:
    model = nn.MultiheadAttention(64, 4)  # its out_proj is a subclass whose weight is read directly
    with pytest.raises(ValueError, match=r"no nn\.Linear inside; for one layer use NF4Linear"):
        quantize_model(model)


def test_a_bad_weight_leaves_the_model_as_it_was() -> None:
    for bad, text in ((torch.nan, "nan"), (torch.inf, "inf")):
        model = Model()
        with torch.no_grad():
            model.blocks[1]["down"].weight[3, 5] = bad
        message = rf"^blocks\.1\.down\.weight\[3, 5\] is {text} in float32; 4-bit"
        with pytest.raises(ValueError, match=message):
            quantize_model(model)
        assert set(kinds(model).values()) == {nn.Linear}
    model = Model()
    integers = torch.ones(64, 64, dtype=torch.int8)
    model.blocks[0]["up"].weight = nn.Parameter(integers, requires_grad=False)
    with pytest.raises(TypeError, match=r"^blocks\.0\.up\.weight must be float16, .* torch\.int8"):
        quantize_model(model)
    assert set(kinds(model).values()) == {nn.Linear}
    with pytest.raises(ValueError, match=r"^0\.weight is on the meta device"):
        quantize_model(nn.Sequential(nn.Linear(64, 64, device="meta")))
    with pytest.raises(ValueError, match="code must be one of"):
        quantize_model(Model(), code="nf8")
    with pytest.raises(ValueError, match="block_size must be"):
        quantize_model(Model(), block_size=63)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e37, torch.float32, r"the 128 scales sum to more than float32 holds"),
        (1e300, torch.float64, r"^blocks\.1\.down\.weight\[0, 0\] is inf in float32"),
    ],
)
def test_what_float32_cannot_hold_leaves_the_model_as_it_was(
    value: float, dtype: torch.dtype, message: str
) -> None:
    model = Model().to(dtype)
    nn.init.constant_(model.blocks[1]["down"].weight, value)
    with pytest.raises(ValueError, match=message):
        quantize_model(model)
    assert set(kinds(model).values()) == {nn.Linear}


def test_large_weights_without_double_quantization_are_fine() -> None:
    model = Model()
    nn.init.constant_(model.blocks[1]["down"].weight, 3e38)
    assert quantize_model(model, double_quant=False).modules == EVERY
    assert torch.equal(model.blocks[1]["down"].dense_weight(), torch.full((64, 128), 3e38))


def test_values_are_read_once_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is waited for once, however many weights there are."""
    monkeypatch.setenv("LORA_KERNELS", "triton")
    model = Model()
    quantize_model(Model())  # tables are placed
    reads: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.__name__.startswith(("_local_scalar_dense", "nonzero", "equal")):
                reads.append(func.__name__)
            return func(*args, **(kwargs or {}))

    tolist = torch.Tensor.tolist

    def read(tensor: torch.Tensor) -> list:
        reads.append(f"{tensor.numel()} bounds")
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    with Watch():
        quantize_model(model)
    assert "4 bounds" in reads
    assert len(reads) == 1, reads


def test_nothing_to_do_is_an_error_that_says_why() -> None:
    model = Model()
    quantize_model(model)
    with pytest.raises(ValueError, match="quantized already: 4 layers are 4-bit and no other"):
        quantize_model(model)
    with pytest.raises(ValueError, match=r"every linear layer is kept dense: 0 \(skipped\)"):
        quantize_model(nn.Sequential(nn.Linear(64, 64)), skip=["0"])
    with pytest.raises(ValueError, match=r"no nn\.Linear inside; for one layer"):
        quantize_model(nn.Linear(64, 64))


def test_dense_weights_are_freed_on_the_way() -> None:
    """Of eight layers, no more than one dense weight is alive beside those still to be done."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    alive: list[int] = []
    made = NF4Linear.from_tensor.__func__

    def count(cls: type, *args: object, **kwargs: object) -> NF4Linear:
        alive.append(sum(isinstance(m, nn.Linear) for m in model))
        return made(cls, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NF4Linear, "from_tensor", classmethod(count))
        quantize_model(model)
    assert alive == [8, 7, 6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dequantize_model_is_the_way_back(dtype: torch.dtype | None) -> None:
    model = Model().eval()
    quantize_model(model)
    wanted = {
        name: model.get_submodule(name).dense_weight(dtype or torch.float32) for name in EVERY
    }
    assert dequantize_model(model, dtype) == list(EVERY)
    for name, weight in wanted.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert torch.equal(layer.weight, weight)
        assert not layer.training
        assert not any(p.requires_grad for p in layer.parameters())
    assert dequantize_model(model) == []
