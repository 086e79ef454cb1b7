"""The host's side of both numba pages: conversion, memory, launches, and what is left to sum when they are done.

A page's kernels run a stretch of mini-batches of every chain, with one thread block for each (head, batch). The fast
weights live in the tensors of the final state while they are being learned, and their cotangents in the gradients of
the initial ones. The forward keeps the weights at the start of every `EVERY`-th mini-batch; the backward takes the
stretches from last to first and runs the forward again on each, keeping them all.

fp32 is read as it lies in memory, whatever its strides; bf16 and fp16 are converted at the boundary, copies of the
whole tensors, and everything in between is fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from numba import config, cuda
from torch import Tensor

from spec.problem import ARRAY_DTYPE, Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs, tensor_specs, validate

EVERY = 16  # mini-batches between two kept states
THREADS = (32, 8)  # columns, rows
SIMULATED_THREADS = (2, 2)  # the simulator runs a Python thread for each
SHARED_BYTES = 47 * 1024  # of the 48 KB that a kernel may declare; the rest is for a number or two a row

Shape = tuple[int, ...]


class Kernels(NamedTuple):
    """A page's kernels for one problem, and the shapes of the scratch that each chain needs for them.

    `forward(inputs, outputs, kept, scratch, first, count, every)` runs `count` mini-batches from `first` on.
    `backward(inputs, d_out, kept, gradients, scratch, first, count)` takes the weights at the start of each of them.
    Of the gradients it writes `token_eta` as [2 B T H], what the read-out and the update of each token give, and
    `ln_weight` and `ln_bias` as [N B H D].
    """

    forward: Any
    backward: Any
    forward_scratch: tuple[Shape, ...]
    backward_scratch: tuple[Shape, ...]


class Residuals(NamedTuple):
    """What the backward needs: the inputs, and the fast weights [S B H ...] that were kept."""

    inputs: Inputs
    kept: tuple[Tensor, ...]
    every: int


def fitting(tiles: int, rows: int, columns: int) -> int:
    """How many of so many float32 tiles [rows, columns] fit into shared memory."""
    return min(tiles, SHARED_BYTES // (4 * rows * columns))


def forward(
    kernels: Callable[[Problem], Kernels], inputs: Inputs, problem: Problem, every: int
) -> tuple[Outputs, Residuals]:
    """Run the forward kernel over all mini-batches."""
    validate(inputs, INPUTS, problem)
    _check_place(inputs)
    made = kernels(problem)
    given = _float(inputs)
    outputs = OUTPUTS[problem.inner_model](
        _empty(given.xq.shape, given.xq), *(x.clone(memory_format=torch.contiguous_format) for x in given[7:])
    )
    kept = _room(-(-problem.mini_batches // every), outputs)
    scratch = _scratch(made.forward_scratch, problem, given.xq)
    _launch(made.forward, problem, given, outputs, kept, scratch, 0, problem.mini_batches, every)
    return outputs._replace(out=outputs.out.to(inputs.xq.dtype)), Residuals(inputs, kept, every)


def backward(
    kernels: Callable[[Problem], Kernels], cotangents: Outputs, residuals: Residuals, problem: Problem
) -> Inputs:
    """Run the backward kernel over every stretch, last to first."""
    validate(cotangents, OUTPUTS, problem)
    _check_place(cotangents)
    made = kernels(problem)
    given, pulled = _float(residuals.inputs), _float(cotangents)
    gradients = _partial_gradients(pulled, problem)
    scratch = _scratch(made.backward_scratch, problem, pulled.out)
    if residuals.every > 1:
        again = type(pulled)(*(_empty(x.shape, x) for x in pulled))  # what the forward leaves when it runs again
        held = _room(min(residuals.every, problem.mini_batches), again)
        again_scratch = _scratch(made.forward_scratch, problem, pulled.out)
    for stretch in reversed(range(residuals.kept[0].shape[0])):
        first = stretch * residuals.every
        count = min(residuals.every, problem.mini_batches - first)
        if residuals.every > 1:
            for start, kept in zip(again[1:], residuals.kept, strict=True):
                start.copy_(kept[stretch])
            _launch(made.forward, problem, given, again, held, again_scratch, first, count, 1)
        else:
            held = tuple(kept[stretch : stretch + 1] for kept in residuals.kept)
        _launch(made.backward, problem, given, (pulled.out,), held, gradients, scratch, first, count)
    return _finish(gradients, problem)


def _partial_gradients(pulled: Outputs, problem: Problem) -> Inputs:
    """The gradients as the kernels write them, with the cotangents of the final state where those of w1, b1 go."""
    kind, like = INPUTS[problem.inner_model], pulled.out
    tokens, heads = (problem.batch, problem.tokens, problem.heads), (problem.heads, problem.head_dim)
    shapes = {spec.name: spec.shape for spec in tensor_specs(kind, problem)[:7]}
    shapes |= {"token_eta": (2, *tokens)} | dict.fromkeys(
        ("ln_weight", "ln_bias"), (problem.mini_batches, problem.batch, *heads)
    )
    states = (x.clone(memory_format=torch.contiguous_format) for x in pulled[1:])
    return kind(*(_empty(shape, like) for shape in shapes.values()), *states)


def _finish(gradients: Inputs, problem: Problem) -> Inputs:
    """Sum what the kernels left apart, and convert to the dtypes of the inputs."""
    per_position = gradients.token_eta.unflatten(2, (problem.mini_batches, problem.mini_batch)).sum((1, 2, 4))
    read, updated = per_position  # [M] each
    d_token_eta = read if problem.causal else torch.zeros_like(read)
    d_token_eta[-1] += updated.sum() if problem.causal else read.sum() + updated.sum()
    whole = gradients._replace(
        token_eta=d_token_eta, ln_weight=gradients.ln_weight.sum((0, 1)), ln_bias=gradients.ln_bias.sum((0, 1))
    )
    specs = tensor_specs(type(gradients), problem)
    return type(gradients)(
        *(x.to(getattr(torch, ARRAY_DTYPE[spec.dtype])) for spec, x in zip(specs, whole, strict=True))
    )


def _launch(kernel: Any, problem: Problem, *arguments: Any) -> None:
    """One thread block for each (head, batch), on PyTorch's current stream; tensors are handed over without a copy."""
    grid, device = (problem.heads, problem.batch), arguments[0].xq.device
    if device.type == "cpu":
        with _short_turns():
            kernel[grid, SIMULATED_THREADS](*_each(arguments, Tensor.numpy))
        return
    with torch.cuda.device(device):
        stream = cuda.external_stream(torch.cuda.current_stream().cuda_stream)
        kernel[grid, THREADS, stream](*_each(arguments, cuda.as_cuda_array))


@contextmanager
def _short_turns() -> Iterator[None]:
    """The simulator's threads poll at a barrier: let them pass the interpreter on sooner than after 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _each(arguments: Any, convert: Callable[[Tensor], Any]) -> Any:
    """The same tuples, named or not, with every tensor converted."""
    if isinstance(arguments, Tensor):
        return convert(arguments.detach())
    if not isinstance(arguments, tuple):
        return arguments
    values = [_each(argument, convert) for argument in arguments]
    return type(arguments)(*values) if hasattr(arguments, "_fields") else tuple(values)


def _check_place(tensors: Inputs | Outputs) -> None:
    """Raise ValueError unless all tensors are on one device that numba drives in this process."""
    device = tensors[0].device
    for name, x in zip(tensors._fields, tensors, strict=True):
        if x.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")
    if device.type != ("cpu" if config.ENABLE_CUDASIM else "cuda"):
        hint = "numba.cuda runs on CPU tensors where NUMBA_ENABLE_CUDASIM=1 was set before its import, and only there"
        raise ValueError(f"{tensors._fields[0]}: {hint}, got a tensor on {device}")


def _float(tensors: Any) -> Any:
    return type(tensors)(*(x.detach().float() for x in tensors))


def _empty(shape: Shape, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _room(count: int, outputs: Outputs) -> tuple[Tensor, ...]:
    """Memory for so many states."""
    return tuple(_empty((count, *x.shape), x) for x in outputs[1:])


def _scratch(shapes: tuple[Shape, ...], problem: Problem, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(_empty((problem.batch, problem.heads, *shape), like) for shape in shapes)
