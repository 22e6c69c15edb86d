"""Damaged model folders: whatever is changed, `generate` answers or says one line.

A valid folder of each of several shapes is damaged in one place: a key of a JSON file, a tensor, a
token, or bytes of a file. Then `lora-core generate` runs on it. It may work, since not every change
does harm; else it must end with exit code 1 and one line that names a file, a key, a tensor or a
token: no other exception, no hang, no memory beyond what the folder itself needs.
"""

import copy
import json
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_core
from lora_core.checkpoint import save_model
from lora_core.cli.main import main
from lora_core.models import CausalLM, ModelConfig

CASES = 100
FULL_CASES = 1000
SECONDS = 60  # a hang, not slowness: a case takes some hundredths of a second
ADDRESSES = 2 * 2**30  # bytes of address space that a case may take, threads' stacks included
MEGABYTES = 400  # of growth over all cases; a folder takes about one

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": None,
    "max_position_embeddings": 64,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 16,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "phi3": {"rope_parameters": LONG},
    "smollm3": {},
    "granite": {"logits_scaling": 2.0},
}
ODD: list[Any] = [
    None, True, 0, 1, -1, 3, 10**12, 10**30, 0.5, -2.5, 1e-320, 1e308, float("nan"), float("inf"),
    "", "x", "32", "\u0000", [], [1], ["a"], [[]], {}, {"a": 1}, {"rope_type": "yarn"}, [-1, 10**9],
]  # fmt: skip
JSONS = ("config.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each shape, with the shipped model's tokenizer; one more in several shards."""
    base, folders = lora_core.base_model_path(), {}
    vocab_size = json.loads((base / "config.json").read_text())["vocab_size"]
    for model_type, changes in SHAPES.items():
        raw = {"model_type": model_type, "vocab_size": vocab_size} | SIZES | changes
        model = CausalLM(ModelConfig.from_dict(raw))
        model.init_weights(0.1, torch.Generator().manual_seed(0))
        folders[model_type] = tmp_path_factory.mktemp(model_type)
        save_model(model, folders[model_type], base)
    folders["shards"] = tmp_path_factory.mktemp("shards")
    save_model(model, folders["shards"], base, max_shard_size=100_000)
    return folders


def damage_json(folder: Path, rng: random.Random) -> str:
    """Change one key of a JSON file, at any depth."""
    path = folder / rng.choice(JSONS)
    raw = json.loads(path.read_text(encoding="utf-8"))
    holder = raw
    while nested := [v for v in holder.values() if isinstance(v, dict) and v]:
        if rng.random() < 0.4:
            break
        holder = rng.choice(nested)
    key = rng.choice(sorted(holder)) if holder else "added"
    if rng.random() < 0.25:
        holder.pop(key, None)
        what = "deleted"
    elif type(holder.get(key)) is int and rng.random() < 0.5:
        holder[key] += rng.choice([-1, 1, 2, holder[key]])
        what = repr(holder[key])
    else:
        holder[key] = copy.deepcopy(rng.choice(ODD))
        what = repr(holder[key])
    path.write_text(json.dumps(raw), encoding="utf-8")
    return f"{path.name}: {key} {what}"


def damage_tensor(folder: Path, rng: random.Random) -> str:
    """Change one tensor of one safetensors file."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    how = rng.choice(["gone", "extra", "renamed", "dtype", "shape", "flat", "empty", "value"])
    if how == "extra":
        tensors |= {name: tensor, f"{name}.more": torch.ones(3)}
    elif how == "renamed":
        tensors[name.replace("model.", "", 1) if rng.random() < 0.5 else name + "_"] = tensor
    elif how == "dtype":
        kinds = [torch.int8, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn]
        tensors[name] = tensor.to(rng.choice(kinds))
    elif how == "shape":
        tensors[name] = torch.cat((tensor, tensor[:1]))
    elif how == "flat":
        tensors[name] = tensor.reshape(-1)
    elif how == "empty":
        tensors[name] = tensor[:0]
    elif how == "value":
        tensor.view(-1)[0] = rng.choice([float("nan"), float("inf"), 3e38])
        tensors[name] = tensor
    save_file(tensors, path)
    return f"{path.name}: {name} {how}"


def damage_bytes(folder: Path, rng: random.Random) -> str:
    """Cut a file short, empty it, or overwrite some bytes near its beginning."""
    path = rng.choice(sorted(file for file in folder.iterdir() if file.is_file()))
    content = bytearray(path.read_bytes())
    how = rng.choice(["cut", "empty", "bytes", "bytes", "gone", "longer"])
    if how == "cut":
        del content[rng.randrange(max(len(content), 1)) :]
    elif how == "empty":
        content.clear()
    elif how == "longer":
        content += b"x" * rng.randint(1, 9)
    elif how == "bytes":
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(min(len(content), 2000))] = rng.randrange(256)
    path.unlink() if how == "gone" else path.write_bytes(content)
    return f"{path.name}: {how}"


def damage_tokens(folder: Path, rng: random.Random) -> str:
    """Take a token from the tokenizer, or give it too many."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    vocab, how = raw["model"]["vocab"], rng.choice(["gone", "many", "far", "twice", "special"])
    if how == "gone":
        vocab.pop(rng.choice(sorted(vocab)))
    elif how == "many":
        vocab |= {f"<|more{i}|>": len(vocab) + i for i in range(rng.choice([1, 5000]))}
    elif how == "far":
        vocab[rng.choice(sorted(vocab))] = rng.choice([10**6, 2**32 - 1])
    elif how == "twice":
        vocab[rng.choice(sorted(vocab))] = 5
    else:
        raw["added_tokens"] = rng.sample(raw["added_tokens"], len(raw["added_tokens"]) // 2)
    path.write_text(json.dumps(raw), encoding="utf-8")
    return f"{path.name}: {how}"


DAMAGE: list[Callable[[Path, random.Random], str]] = [
    *3 * [damage_json],
    *2 * [damage_tensor],
    damage_bytes,
    damage_tokens,
]


@pytest.fixture
def alarm() -> Iterator[None]:
    """Fail what hangs."""

    def ring(*_: object) -> None:
        raise AssertionError(f"still running after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def limited() -> Iterator[None]:
    """Let an allocation fail that goes far beyond what the process has already."""
    status = Path("/proc/self/status")
    if not status.is_file():  # not Linux: the growth at the end is all that is seen
        yield
        return
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    held = int(lines["VmSize"].split()[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESSES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run_one(folder: Path, quantize: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    words = ["generate", "--model", str(folder), "--quantize", quantize, "--device", "cpu"]
    capsys.readouterr()
    code = main([*words, "--prompt", "What?", "--max-new-tokens", "1"])
    said = capsys.readouterr().err.splitlines()
    failures = [line for line in said if line.startswith("lora-core generate:")]
    assert len(failures) == (code != 0), said
    return code, failures[0] if failures else ""


def test_sound_folders_answer(sound: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for folder in sound.values():
        assert run_one(folder, "nf4", capsys) == (0, "")


def test_an_empty_template_is_named(
    sound: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(sound["llama"], tmp_path / "model")
    (folder / "chat_template.jinja").write_text("")
    code, line = run_one(folder, "none", capsys)
    assert code == 1
    assert "the chat template writes nothing for this conversation" in line


@pytest.mark.filterwarnings("default")  # a warning is a line on the terminal here
@pytest.mark.usefixtures("alarm", "limited")
@pytest.mark.parametrize("part", range(10))
def test_damaged_folders_answer_or_say_one_line(
    sound: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    full_run: bool,
    part: int,
) -> None:
    before, failed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    signal.alarm(SECONDS * (10 if full_run else 1))
    for case in range((FULL_CASES if full_run else CASES) // 10):
        rng = random.Random(1000 * part + case)
        shape = rng.choice(sorted(sound))
        folder = tmp_path / str(case)
        shutil.copytree(sound[shape], folder)
        what = f"case {part}-{case}, {shape}: {rng.choice(DAMAGE)(folder, rng)}"
        try:
            code, line = run_one(folder, rng.choice(["nf4", "none"]), capsys)
        except Exception as error:
            raise AssertionError(f"{what} ended in {type(error).__name__}: {error}") from error
        assert code in (0, 1), what
        assert len(line) < 700, f"{what}: {line}"
        # the message points into the folder, or at a tensor, a key or a token of it
        assert code == 0 or str(folder) in line or _names(line, sound[shape]), f"{what}: {line}"
        failed += code
        shutil.rmtree(folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"memory grew by {grown:.0f} MB"
    assert failed, "no damage was noticed: the test would pass on anything"


def _names(line: str, folder: Path) -> bool:
    """Whether a message names a key, a tensor or a file of the folder."""
    known = {file.name for file in folder.iterdir()}
    known |= {"<|more", "chat template"}  # tokens of `damage_tokens`; its lines name no file
    for file in folder.glob("*.safetensors"):
        known |= {name.rpartition(".")[0] for name in load_file(file)}
    for name in JSONS:
        known |= set(json.loads((folder / name).read_text(encoding="utf-8")))
    return any(name in line for name in known)
