"""`torch.compile` as a switch: each layer of the model is compiled, for the time of a run.

A layer, not the model: layers are alike, and the compiler takes a layer's parameters as arguments,
so one graph serves all of them and the time to compile does not grow with the depth. (The first
layer has a graph of its own where its input needs no gradient.) What lies outside, embedding, final
norm and the loss operator, is a few calls a step.

Sizes of batch and length are symbols in the graph, so that another length needs no other graph. Of
30 batches of 5 lengths through a decoder of 4 layers (tests/train/test_compile.py counts):

    sizes as symbols     2 graphs
    a graph a size      10 graphs, each of which takes as long to compile

Only a size of 1 is a case of its own, and whether there is a mask. Symbols are never taken for one
another because their first values were equal (`use_duck_shape`): that would be one more graph when
they differ.

It is a promise, not a hint: a layer of which a part cannot be compiled is an error that says so
(`fullgraph`). Evaluation runs as it does without the switch. Activation checkpointing goes around
the compiled layer, so a recomputation calls the very graph that the forward pass called.

The numbers: operators of this library are called as they are, whatever lies between is fused, which
rounds less often in 16 bits; losses equal the plain run's to rounding. Dropout that the compiler
generates draws other numbers than PyTorch's own, from the same generator, so a run is its own
repetition, stopped and resumed or not, but not that of a run without the switch
(`torch._inductor.config.fallback_random = True` makes them alike, at the price of the fusion).

transformers' `torch_compile=True` compiles the whole model's forward with a graph for each size.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lora_core.train.recompute import patched_layers, repeated_layers

GRAPHS = 64  # of one run; torch's own limit is 8, and then a run would stop


@contextlib.contextmanager
def compiled_layers(
    model: nn.Module, on: bool = True, *, backend: str = "inductor"
) -> Iterator[None]:
    """Within the block the model's layers run compiled where they train.

    Args:
        model: any module with an `nn.ModuleList` of layers.
        on: False changes nothing.
        backend: torch.compile's; "aot_eager" traces and differentiates without generating code.

    Yields:
        None. Afterwards the layers are as they were, and what was compiled is dropped.

    Raises:
        ValueError: there is nothing to compile with, no list of layers, or, when a layer is first
            called, something in it that cannot be compiled.
    """
    if not on:
        yield
        return
    # the compiler is loaded by whoever asks for it
    from torch._dynamo import config, eval_frame
    from torch.fx.experimental import _config as symbols

    layers = repeated_layers(model, "compile")
    if backend == "inductor":
        check_compiler(next(model.parameters()).device)
    # one function for all layers, which is where the compiler keeps its graphs
    compiled = torch.compile(_call, fullgraph=True, dynamic=True, backend=backend)
    try:
        with (
            config.patch(recompile_limit=GRAPHS),
            symbols.patch(use_duck_shape=False),  # type: ignore[attr-defined]  # made at import
            patched_layers(layers, functools.partial(functools.partial, _in_training, compiled)),
        ):
            yield
    finally:
        eval_frame.reset_code(_call.__code__)  # type: ignore[attr-defined]  # a C function


def check_compiler(device: torch.device) -> None:
    """Find out before the first step whether inductor has what it generates code with.

    Args:
        device: where the model is.

    Raises:
        ValueError: no C++ compiler, or on a GPU no Triton.
    """
    from torch._inductor import cpp_builder, exc

    if device.type != "cpu":
        if not torch.utils._triton.has_triton():
            raise ValueError(
                f"compile needs Triton on {device.type}, which this torch does not find: install "
                "triton, or leave compile out"
            )
        return
    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, OSError):
        raise ValueError(
            "compile needs a C++ compiler and finds none: install g++ or clang++, name one in CXX, "
            "or leave compile out"
        ) from None


def _call(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _in_training(compiled: Any, forward: Any, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not layer.training:
        return forward(*args, **kwargs)
    try:
        return compiled(forward, *args, **kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        first = next(line for line in str(error).splitlines() if line.strip())
        raise ValueError(
            f"{type(layer).__name__} cannot be compiled ({first.strip()}): leave compile out"
        ) from error
