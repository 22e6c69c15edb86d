"""AdapterHub's files: those that its library wrote, those written for it, and those refused."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_core import (
    BottleneckConfig,
    LoRAConfig,
    add_adapter,
    delete_adapter,
    load_adapter,
    load_adapterhub,
    load_model,
    save_adapter,
    save_adapterhub,
)
from lora_core.adapters import adapted_modules
from lora_core.testing.bounds import exceeds, gamma

pytestmark = pytest.mark.oracle
FILES = Path(__file__).parent / "adapterhub"
CASES = sorted(
    folder.name for folder in FILES.iterdir() if (folder / "adapter_config.json").exists()
)


@pytest.fixture(scope="module")
def maker(oracle):
    """The script that wrote the files: the models they are for."""
    oracle("transformers")
    spec = importlib.util.spec_from_file_location("make_files", FILES / "make_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def outputs():
    """What the library's models returned."""
    return load_file(FILES / "logits.safetensors")


@pytest.fixture
def unchanged():
    """A context that checks that an error leaves a model as it was."""

    def snapshot(model: nn.Module):
        hosts = {
            name: (list(host.active), list(host.adapters)) for name, host in adapted_modules(model)
        }
        state = [(k, id(p), p.requires_grad, p.tolist()) for k, p in model.named_parameters()]
        return [(name, id(module)) for name, module in model.named_modules()], hosts, state

    class Unchanged:
        def __init__(self, model):
            self.model, self.before = model, snapshot(model)

        def __enter__(self):
            return self.model

        def __exit__(self, *_):
            assert snapshot(self.model) == self.before

    return Unchanged


@pytest.fixture
def copied(tmp_path):
    """A copy of one of the library's folders, with its configuration and tensors edited."""

    def copy(case="bert-seq_bn", record=None, config=None, tensors=None) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(FILES / case, folder)
        found = json.loads((folder / "adapter_config.json").read_text())
        found |= record or {}
        found["config"] |= config or {}
        (folder / "adapter_config.json").write_text(json.dumps(found))
        if tensors is not None:
            save_file(
                tensors(load_file(folder / "adapter.safetensors")), folder / "adapter.safetensors"
            )
        return folder

    return copy


def assert_equal(ours, theirs, family):
    """Equal but for the rounding of float64; Llama's norms and rotation compute in float32."""
    u = 2.0**-24 if family == "llama" else 2.0**-53
    bound = gamma(256, u) * theirs.abs().max()
    assert (fault := exceeds(ours, theirs, bound.expand_as(theirs))) is None, fault


# --- reading ---


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_their_library_gives_its_outputs(maker, outputs, case):
    family = case.split("-")[0]
    model = maker.tiny(family)
    load_adapterhub(model, FILES / case)
    got = maker.logits(model)
    assert_equal(got, outputs[case], family)
    assert (got - outputs[family]).abs().max() > 0.01
    delete_adapter(model, "default")
    assert_equal(maker.logits(model), outputs[family], family)


def test_there_are_files_of_every_kind() -> None:
    kinds = {case.split("-")[1] for case in CASES}
    assert kinds == {"both", "double_seq_bn", "learned", "normed", "par_bn", "seq_bn"}
    assert len(CASES) == 18


def test_a_file_of_a_model_with_a_head_loads_without_and_back(maker, outputs, tmp_path):
    import transformers

    whole = maker.tiny("bert")
    model = transformers.BertModel(whole.config, add_pooling_layer=False).eval()
    model.load_state_dict(whole.bert.state_dict(), strict=True)
    load_adapterhub(model, FILES / "bert-double_seq_bn", "task")
    with torch.no_grad():
        hidden = model.double()(input_ids=maker.IDS).last_hidden_state
        assert_equal(whole.double().cls(hidden), outputs["bert-double_seq_bn"], "bert")
    save_adapterhub(model.float(), tmp_path, "task")
    assert all(
        key.startswith("encoder.layer.") for key in load_file(tmp_path / "adapter.safetensors")
    )
    again = maker.tiny("bert")
    load_adapterhub(again, tmp_path)
    assert_equal(maker.logits(again), outputs["bert-double_seq_bn"], "bert")


def test_a_file_for_llama_loads_into_the_own_decoder(maker, outputs, tmp_path):
    maker.tiny("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    load_adapterhub(model, FILES / "llama-both")
    assert_equal(maker.logits(model), outputs["llama-both"], "llama")


def test_names_and_training(maker):
    model = maker.tiny("bert")
    report = load_adapterhub(model, FILES / "bert-double_seq_bn", "b", trainable=True)
    assert report.name == "b"
    assert report.kind == "ADAPTERHUB"
    assert len(report.sites) == 4
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 16
    assert all(".b." in name for name in trained)
    model(input_ids=maker.IDS).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    other = maker.tiny("bert")
    load_adapterhub(other, FILES / "bert-double_seq_bn")
    assert not any(p.requires_grad for p in other.parameters())


def test_files_of_old_versions(maker, outputs, copied):
    """Other names of modules and of GELU, options nobody reads, no invertible adapter."""

    def old(tensors):
        new = "layer_text_task_adapters"
        return {key.replace("output.adapters", f"output.{new}"): t for key, t in tensors.items()}

    folder = copied(
        record={"type": "text_task"},
        config={
            "attention_type": "sent-lvl-dynamic",
            "new_attention_norm": False,
            "inv_adapter": "nice",
            "non_linearity": "gelu",
        },
        tensors=old,
    )
    record = json.loads((folder / "adapter_config.json").read_text())
    del record["version"]
    (folder / "adapter_config.json").write_text(json.dumps(record))
    model = maker.tiny("bert")
    load_adapterhub(model, folder)
    for _, host in adapted_modules(model):
        for adapter in host.adapters.values():
            assert getattr(adapter, "activation", "gelu_tanh") == "gelu_tanh"


def test_a_head_beside_the_adapter_is_told(maker, copied):
    folder = copied()
    (folder / "model_head.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"model_head.safetensors was not read: the model keeps"):
        load_adapterhub(maker.tiny("bert"), folder)


def test_the_own_format_keeps_them(maker, outputs, tmp_path):
    model = maker.tiny("bert")
    load_adapterhub(model, FILES / "bert-both")
    save_adapter(model, tmp_path)
    again = maker.tiny("bert")
    load_adapter(again, tmp_path)
    assert_equal(maker.logits(again), outputs["bert-both"], "bert")


# --- writing ---


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_their_library_wrote(maker, case, tmp_path):
    model = maker.tiny(case.split("-")[0])
    load_adapterhub(model, FILES / case, "task")
    save_adapterhub(model, tmp_path, "task")
    ours, theirs = (
        load_file(folder / "adapter.safetensors") for folder in (tmp_path, FILES / case)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (
        json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path, FILES / case)
    )
    if case.endswith("normed") and not case.startswith("bert"):  # where it is the same as seq_bn
        theirs["config"] |= {"original_ln_after": True, "residual_before_ln": True}
    theirs["config"]["init_weights"] = "mam_adapter"
    assert ours == theirs


@pytest.mark.parametrize(
    ("family", "placement"),
    [
        *(
            (family, name)
            for family in ("bert", "llama", "gpt2")
            for name in ("houlsby", "pfeiffer")
        ),
        ("bert", "parallel"),
    ],
)
def test_own_placements_are_written_with_equal_outputs(maker, family, placement, tmp_path):
    model = maker.tiny(family)
    config = BottleneckConfig(2.5, activation="silu", placement=placement, scaling=2)
    add_adapter(model, config, "mine")
    maker.waves(model, only=".mine.")
    save_adapterhub(model, tmp_path, "mine", base_model="some/base")
    record = json.loads((tmp_path / "adapter_config.json").read_text())
    assert record["model_name"] == "some/base"
    # an integer would be refused there, and 8 // 2.5 has to be the width
    assert isinstance(record["config"]["scaling"], float)
    assert record["config"]["reduction_factor"] == 2.5
    assert record["config"]["non_linearity"] == "swish"
    again = maker.tiny(family)
    load_adapterhub(again, tmp_path)
    assert_equal(maker.logits(again), maker.logits(model), family)


def test_a_reduction_that_their_rule_reads_otherwise_is_rewritten(maker, tmp_path):
    model = maker.tiny("bert")
    add_adapter(model, BottleneckConfig(0.1))  # 8 / 0.1 is 80, 8 // 0.1 is 79
    assert 8 // 0.1 == 79
    save_adapterhub(model, tmp_path)
    factor = json.loads((tmp_path / "adapter_config.json").read_text())["config"][
        "reduction_factor"
    ]
    assert 8 // factor == 80


def test_left_out_layers_are_written(maker, tmp_path):
    model = maker.tiny("llama")
    add_adapter(model, BottleneckConfig(2, placement="houlsby", exclude=r".*\.1\..*"))
    save_adapterhub(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["config"]["leave_out"] == [1]
    load_adapterhub(maker.tiny("llama"), tmp_path)


def test_a_crash_leaves_no_old_configuration_with_new_weights(maker, tmp_path, monkeypatch):
    from lora_core.checkpoint import adapter_files

    model = maker.tiny("bert")
    load_adapterhub(model, FILES / "bert-seq_bn")
    save_adapterhub(model, tmp_path)
    real = adapter_files.atomic_write

    def full_disk(path, content):
        if path.name == "adapter_config.json":
            raise OSError("no space")
        real(path, content)

    monkeypatch.setattr(adapter_files, "atomic_write", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_adapterhub(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        load_adapterhub(maker.tiny("bert"), tmp_path)


# --- refusals ---


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"ln_before": True}, "ln_before=True"),
        ({"use_gating": True}, "use_gating=True"),
        ({"phm_layer": True}, "phm_layer=True"),
        ({"stochastic_depth": 0.1}, "stochastic_depth=0.1"),
        ({"inv_adapter": "nice"}, "inv_adapter='nice'"),
        ({"brand_new": 3}, "brand_new=3"),
        ({"original_ln_after": False}, "lose the layer's residual"),
        ({"residual_before_ln": False}, "add it twice"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln='post_add'"),
        ({"is_parallel": True, "original_ln_after": False}, "is_parallel=True"),
        ({"non_linearity": "mish"}, "non_linearity='mish' is not supported"),
        ({"architecture": "lora"}, "architecture 'lora' is no bottleneck"),
        ({"scaling": "some"}, "scaling must be a number, 'learned' or 'channel'"),
        ({"output_adapter": False}, "no adapter is left"),
        ({"leave_out": [7]}, "no layer 7, only 0 … 1"),
        ({"reduction_factor": {"0": 3}}, "reduction says nothing of layer 1"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"mh_adapter": True}, "'0.attention.output.adapters.adapter_down.0.bias' is missing"),
        ({"reduction_factor": 8}, r"has shape \(2, 8\), the model needs \(1, 8\)"),
    ],
)
def test_options_that_compute_something_else(maker, unchanged, copied, config, told):
    folder = copied(
        "bert-double_seq_bn" if "reduction_factor" in config else "bert-seq_bn", config=config
    )
    with unchanged(maker.tiny("bert")) as model, pytest.raises(ValueError, match=told) as error:
        load_adapterhub(model, folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("case", "edits", "told"),
    [
        ("llama-seq_bn", {}, "belongs to a model of type 'llama', this is 'bert'"),
        ("bert-seq_bn", {"record": {"model_type": "albert"}}, "of type 'albert', this is 'bert'"),
        ("bert-seq_bn", {"record": {"name": "x"}}, "is missing"),
        ("bert-seq_bn", {"tensors": renamed("layer.1.", "layer.2.")}, "'1.output.*is missing"),
        (
            "bert-seq_bn",
            {"tensors": lambda t: t | {"bert.invertible_adapters.task.F": torch.ones(1)}},
            "'bert.invertible_adapters.task.F' is unexpected",
        ),
        (
            "bert-seq_bn",
            {"tensors": lambda t: t | {f"x.{key}": v.clone() for key, v in t.items()}},
            "two keys mean the same tensor",
        ),
        (
            "bert-seq_bn",
            {"tensors": lambda t: {key: v.long() for key, v in t.items()}},
            "holds torch.int64, not floating-point",
        ),
    ],
)
def test_files_that_do_not_fit(maker, unchanged, copied, case, edits, told):
    folder = copied(case, **edits)
    with unchanged(maker.tiny("bert")) as model, pytest.raises(ValueError, match=told):
        load_adapterhub(model, folder)


def test_folders_that_are_none(maker, copied, tmp_path):
    model = maker.tiny("bert")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_adapterhub(model, tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        load_adapterhub(model, tmp_path)
    folder = copied()
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter.safetensors"):
        load_adapterhub(model, folder)
    (folder / "pytorch_adapter.bin").write_bytes(b"never read")
    with pytest.raises(
        ValueError, match=r"pickle .*refused.*use_safetensors=True.*weights_only=True"
    ):
        load_adapterhub(model, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="PEFT's format: use load_adapter"):
        load_adapterhub(model, folder)
    (folder / "adapter_config.json").write_text('{"config": null, "name": "a"}')
    with pytest.raises(ValueError, match="it is not AdapterHub's"):
        load_adapterhub(model, folder)
    record = json.loads((FILES / "bert-seq_bn" / "adapter_config.json").read_text())
    del record["config"]["reduction_factor"]
    shutil.copy(FILES / "bert-seq_bn" / "adapter.safetensors", folder)
    (folder / "adapter_config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="the config has no 'reduction_factor'"):
        load_adapterhub(model, folder)


def test_what_cannot_be_written(maker, tmp_path):
    model = maker.tiny("llama")
    with pytest.raises(ValueError, match="no adapter 'default' in the model"):
        save_adapterhub(model, tmp_path)
    add_adapter(model, BottleneckConfig(2, placement="parallel"))
    with pytest.raises(
        ValueError, match="normalized input of the sub-layer here, AdapterHub's par_bn"
    ):
        save_adapterhub(model, tmp_path)
    add_adapter(model, BottleneckConfig(2, feed_forward=["up_proj"]), "odd")
    with pytest.raises(
        ValueError, match=r"no place for the adapter at 'model.layers.0.mlp.up_proj'"
    ):
        save_adapterhub(model, tmp_path, "odd")
    add_adapter(
        model, BottleneckConfig(2, placement="houlsby", exclude=["0.mlp.down_proj"]), "part"
    )
    with pytest.raises(ValueError, match="layer 0 has an adapter in one of its sub-layers only"):
        save_adapterhub(model, tmp_path, "part")
    add_adapter(model, LoRAConfig(r=2), "low")
    with pytest.raises(ValueError, match=r"'low' is no bottleneck adapter \(LoRA\): save_adapter"):
        save_adapterhub(model, tmp_path, "low")
    model.config.model_type = "granite"
    with pytest.raises(
        ValueError, match="models of type 'granite' are not supported; those of bert"
    ):
        save_adapterhub(model, tmp_path, "part")
    assert list(tmp_path.iterdir()) == []
    bert = maker.tiny("bert")
    patterns = {"feed_forward": ["1.output.dense"], "feed_forward_input": ["1.output.dense"]}
    add_adapter(bert, BottleneckConfig(2, placement="parallel", **patterns))
    with pytest.raises(ValueError, match="does not see the input of 'intermediate'"):
        save_adapterhub(bert, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"PEFT's format, whose adapter_config.json would be overwritten"
    ):
        save_adapterhub(model, tmp_path, "part")


def test_models_that_are_wired_otherwise(maker, unchanged):
    model = nn.Sequential(nn.Linear(3, 3))
    with unchanged(model), pytest.raises(ValueError, match="wired like none of BERT, Llama, GPT-2"):
        load_adapterhub(model, FILES / "bert-seq_bn")
    two = nn.ModuleDict({"a": maker.tiny("bert"), "b": maker.tiny("bert")})
    with pytest.raises(ValueError, match="two stacks of layers"):
        load_adapterhub(two, FILES / "bert-seq_bn")


def test_a_taken_name_changes_nothing(maker, unchanged):
    model = maker.tiny("bert")
    load_adapterhub(model, FILES / "bert-seq_bn")
    with unchanged(model), pytest.raises(ValueError, match="'default' is taken"):
        load_adapterhub(model, FILES / "bert-par_bn")
