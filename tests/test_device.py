"""Device services on a CPU."""

import subprocess
import sys

import pytest
import torch

from lora_core.device import (
    default_device,
    dtype_policy,
    reset_peak_memory,
    synchronize,
)


def test_the_default_device_computes() -> None:
    device = default_device()
    assert torch.ones(2, device=device).sum().item() == 2
    synchronize(device)
    reset_peak_memory(device)


def test_peak_memory_of_a_process_grows_with_a_large_tensor() -> None:
    code = (
        "import torch\nfrom lora_core.device import peak_memory\nbefore = peak_memory()\n"
        "torch.ones(512 << 20, dtype=torch.uint8)\nprint(peak_memory() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # importing torch peaks above what stays, so the 512 MiB move the peak by a little less
    assert 256 << 20 < int(done.stdout) < 768 << 20


@pytest.mark.parametrize(
    ("name", "dtype", "scaled"),
    [
        ("auto", torch.float32, False),
        ("float32", torch.float32, False),
        ("bfloat16", torch.bfloat16, False),
        ("float16", torch.float16, True),
    ],
)
def test_dtype_policy_on_a_cpu(name: str, dtype: torch.dtype, scaled: bool) -> None:
    policy = dtype_policy(name, "cpu")
    with policy.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype is policy.compute_dtype is dtype
    assert policy.scales_loss is scaled
    assert str(dtype).removeprefix("torch.") in str(policy)
    assert ("loss scaled" in str(policy)) is scaled


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match=r'dtype must be "auto" or one of .*; got .bf16.'):
        dtype_policy("bf16", "cpu")
