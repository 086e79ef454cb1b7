"""The CUDA C++ pages for a model: `ttt`, differentiable by PyTorch and known to its compiler; and DLPack at the door.

`ttt` is made of two custom operators of PyTorch, `ttt_lab::cupy_forward` and `ttt_lab::cupy_backward`, with what they
return described for tracing. `forward` and `backward` are the page's own for the arrays of any framework that speaks
DLPack, JAX among them: nothing is copied on the way in or out, kernels run on PyTorch's current stream, and the
exchange itself orders that stream after the caller's, and the caller's after it.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from implementations.cuda import cupy_ttt_linear, cupy_ttt_mlp
from implementations.cuda.dispatch import first_that_takes
from spec.problem import ARRAY_DTYPE, Dtype, InnerModel, Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs, tensor_specs, validate

_PAGES: dict[str, ModuleType] = {"linear": cupy_ttt_linear, "mlp": cupy_ttt_mlp}
_DTYPES: dict[torch.dtype, Dtype] = {getattr(torch, name): dtype for dtype, name in ARRAY_DTYPE.items()}  # type: ignore


def ttt(inputs: Inputs, problem: Problem) -> Outputs:
    """`LinearOutputs` of `LinearInputs`, or `MlpOutputs` of `MlpInputs`: a TTT layer's output and final state.

    Every input has a gradient, and cotangents of `out` AND of the final state reach it. Reverse mode, once.

    Raises:
        ValueError: a tensor has another shape, dtype, device or layout than the kernels take, or the problem a size.
        NotImplementedError: this machine cannot run the kernels, with the reason.
    """
    if not torch.compiler.is_compiling():  # which cannot look into annotations; the operators check what they get
        validate(inputs, INPUTS, problem)
    if problem.matmul_precision != "ieee":
        raise ValueError(f"matmul_precision: expected ieee, got {problem.matmul_precision}")
    width = len(OUTPUTS[problem.inner_model]._fields)  # type: ignore[attr-defined]
    flat = _forward(list(inputs), problem.inner_model, problem.mini_batch, problem.causal, problem.eps)
    return OUTPUTS[problem.inner_model](*flat[:width])


# --- The operators: flat lists of tensors, and the numbers that no shape says ---


@torch.library.custom_op("ttt_lab::cupy_forward", mutates_args=())
def _forward(inputs: list[Tensor], inner_model: str, mini_batch: int, causal: bool, eps: float) -> list[Tensor]:
    """The outputs, then the tensors that the backward needs beside the inputs."""
    given, problem = _problem(inputs, inner_model, mini_batch, causal, eps)
    outputs, residuals = _rung(given, problem).forward(given, problem)
    return [*outputs, *_tensors(residuals[1:])]


@_forward.register_fake
def _(inputs: list[Tensor], inner_model: str, mini_batch: int, causal: bool, eps: float) -> list[Tensor]:
    given, problem = _problem(inputs, inner_model, mini_batch, causal, eps)
    outputs = [_contiguous(x) for x in (given.xq, *given[7:])]
    return [*outputs, *_tensors(_rung(given, problem).empty_residuals(given, problem)[1:])]


@torch.library.custom_op("ttt_lab::cupy_backward", mutates_args=())
def _backward(
    cotangents: list[Tensor],
    inputs: list[Tensor],
    saved: list[Tensor],
    inner_model: str,
    mini_batch: int,
    causal: bool,
    eps: float,
) -> list[Tensor]:
    """The gradients of the inputs; `saved` is what the forward returned behind its outputs."""
    given, problem = _problem(inputs, inner_model, mini_batch, causal, eps)
    rung = _rung(given, problem)
    kind, leaves, structure = _residuals(rung, problem, given.xq.device)
    tensors = iter(saved)
    held = pytree.tree_unflatten([next(tensors) if isinstance(x, Tensor) else x for x in leaves], structure)
    pulled = OUTPUTS[problem.inner_model](*map(_ready, cotangents))
    return [*rung.backward(pulled, kind(given, *held), problem)]


@_backward.register_fake
def _(
    cotangents: list[Tensor],
    inputs: list[Tensor],
    saved: list[Tensor],
    inner_model: str,
    mini_batch: int,
    causal: bool,
    eps: float,
) -> list[Tensor]:
    return [_contiguous(x) for x in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.inner_model, *ctx.numbers = inputs
    ctx.width, ctx.count = len(OUTPUTS[ctx.inner_model]._fields), len(tensors)  # type: ignore[attr-defined]
    ctx.shapes = [(x.shape, x.dtype, x.device) for x in output[: ctx.width]]
    ctx.save_for_backward(*tensors, *output[ctx.width :])


def _differentiate(ctx: Any, given: list[Tensor | None]) -> tuple[Any, ...]:
    cotangents = [
        torch.zeros(shape, dtype=dtype, device=device) if x is None else x
        for x, (shape, dtype, device) in zip(given, ctx.shapes, strict=False)  # those of what is saved say nothing
    ]
    inputs, saved = [*ctx.saved_tensors[: ctx.count]], [*ctx.saved_tensors[ctx.count :]]
    return _backward(cotangents, inputs, saved, ctx.inner_model, *ctx.numbers), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def _problem(tensors: list[Tensor], inner_model: str, mini_batch: int, causal: bool, eps: float) -> tuple[Any, Problem]:
    """The inputs by name, laid out as every rung takes them, and their problem."""
    inputs = INPUTS[inner_model](*map(_ready, tensors))  # type: ignore[arg-type]
    batch, tokens, heads, head_dim = map(int, inputs.xq.shape)
    inner: InnerModel = "linear" if inner_model == "linear" else "mlp"
    sizes = batch, tokens, heads, head_dim, int(mini_batch)
    problem = Problem(inner, *sizes, causal=causal, eps=eps, dtype=_DTYPES[inputs.xq.dtype])
    validate(inputs, INPUTS, problem)
    return inputs, problem


def _rung(inputs: Any, problem: Problem) -> Any:
    return first_that_takes(problem, inputs.xq.device, _PAGES[problem.inner_model].RUNGS)


@functools.cache
def _residuals(rung: Any, problem: Problem, device: torch.device) -> tuple[Any, list[Any], Any]:
    """What the residuals of a rung are made of beside the inputs: their type, leaves without memory, how they nest."""
    kind = INPUTS[problem.inner_model]
    with FakeTensorMode():
        inputs = kind(
            *(
                torch.empty(spec.shape, dtype=getattr(torch, ARRAY_DTYPE[spec.dtype]), device=device)
                for spec in tensor_specs(kind, problem)
            )
        )
        residuals = rung.empty_residuals(inputs, problem)
    return type(residuals), *pytree.tree_flatten(tuple(residuals[1:]))


def _ready(x: Tensor) -> Tensor:
    """`x`, or a copy if an axis is strided that kernels read in pieces of 16 bytes."""
    pieces = x.dim() < 4 or all(int(stride) * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    offset = int(x.storage_offset()) * x.element_size() % 16
    return x if x.dim() and x.stride(-1) == 1 and pieces and not offset else _copied(x)


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tuple(tree)) if isinstance(x, Tensor)]


# --- Arrays of other frameworks ---


def forward(inputs: Any, problem: Problem) -> tuple[Any, Any]:
    """As the page's, for arrays of any framework that speaks DLPack; the outputs are arrays of the same framework."""
    outputs, residuals = _PAGES[problem.inner_model].forward(_to_torch(inputs), problem)
    return _from_torch(outputs, inputs[0]), residuals


def backward(cotangents: Any, residuals: Any, problem: Problem) -> Any:
    """As the page's, for arrays of any framework that speaks DLPack; the gradients are arrays of the same framework."""
    gradients = _PAGES[problem.inner_model].backward(_to_torch(cotangents), residuals, problem)
    return _from_torch(gradients, cotangents[0])


def _to_torch(arrays: Any) -> Any:
    return type(arrays)(*(x if isinstance(x, Tensor) else torch.from_dlpack(x) for x in arrays))


def _from_torch(tensors: Any, like: Any) -> Any:
    if isinstance(like, Tensor):
        return tensors
    from_dlpack = like.__array_namespace__().from_dlpack
    return type(tensors)(*(from_dlpack(x) for x in tensors))
