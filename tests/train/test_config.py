"""The configuration is checked when it is made, and each field says what it is."""

import dataclasses
import json
from typing import Any

import pytest

from lora_core.cli.flags import field_help
from lora_core.train import DEFAULT_LR, TrainConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, "epochs must be a whole number, 1 or more; got 0"),
        ("steps", 0, "steps must be a whole number, 1 or more; got 0"),
        ("batch_size", 1.5, "batch_size must be a whole number, 1 or more; got 1.5"),
        ("accumulate", True, "accumulate must be a whole number, 1 or more; got True"),
        ("accumulate", None, "accumulate must be a whole number, 1 or more; got None"),
        ("patience", 0, "patience must be a whole number"),
        ("eval_every", 0, "eval_every must be a whole number"),
        ("save_every", 0, "save_every must be a whole number"),
        ("keep", 0, "keep must be a whole number, 1 or more; got 0"),
        ("seed", -1, "seed must be a whole number, 0 or more; got -1"),
        ("lr", 0.0, "lr must be above 0; got 0.0"),
        ("lr", float("nan"), "lr must be a finite number; got nan"),
        ("lr", float("inf"), "lr must be a finite number; got inf"),
        ("lr", "2e-4", "lr must be a finite number; got '2e-4'"),
        ("warmup", None, "warmup must be a finite number; got None"),
        ("clip", "1", "clip must be above 0, or None not to clip; got '1'"),
        ("eps", 0.0, "eps must be above 0"),
        ("clip", 0.0, "clip must be above 0, or None not to clip; got 0.0"),
        ("weight_decay", -0.1, "weight_decay must be 0 or more; got -0.1"),
        ("beta1", 1.0, r"beta1 must be in \[0, 1\); got 1.0"),
        ("beta2", -0.1, r"beta2 must be in \[0, 1\)"),
        ("label_smoothing", 1.0, r"label_smoothing must be in \[0, 1\); got 1.0"),
        ("min_lr_ratio", 1.1, r"min_lr_ratio must be in \[0, 1\]; got 1.1"),
        ("warmup", -1, "warmup must be a share below 1 or a whole number of steps; got -1"),
        ("warmup", 1.5, "warmup must be a share below 1 or a whole number of steps; got 1.5"),
        ("schedule", "cos", "schedule must be one of cosine, linear, constant; got 'cos'"),
        ("dtype", "bf16", "dtype must be one of auto, float32, bfloat16, float16; got 'bf16'"),
        ("resume", True, "resume needs out, the folder that holds the checkpoints"),
    ],
)
def test_a_value_out_of_range(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{field: value})


def test_every_field_is_documented_and_survives_json(tmp_path: Any) -> None:
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names == set(field_help(TrainConfig))
    config = TrainConfig(out=tmp_path, lr=1e-3, steps=5)
    again = TrainConfig(**json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()


def test_learning_rates_by_method() -> None:
    expected = {
        "full": 2e-5,
        "lora": 2e-4,
        "qlora": 2e-4,
        "bottleneck": 1e-4,
        "prompt": 3e-2,
        "prefix": 3e-3,
    }
    assert expected == DEFAULT_LR
