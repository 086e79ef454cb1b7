"""`ttt` on Triton's kernels for PyTorch: custom operators that autograd and torch.compile see through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from implementations.triton import best_linear, best_mlp
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs, TensorSpec, tensor_specs, validate

# Of each inner model the module with `forward` and `backward` as everywhere, and for what a forward saves beside its
# inputs, fp32 tensors: `saved_shapes(problem)`, and `residuals(inputs, saved, problem)` as `backward` takes them.
_PAGES: dict[str, Any] = {"linear": best_linear, "mlp": best_mlp}


def ttt(inputs: Inputs, problem: Problem) -> Outputs:
    """A TTT layer's output and final state, differentiable once, in reverse, and traced as a whole by torch.compile.

    Every input has a gradient, and cotangents of `out` AND of the final state reach it.

    Raises:
        ValueError: there are no kernels for `problem`, or a tensor does not fit it or the kernels.
    """
    if problem.inner_model not in _PAGES:
        raise ValueError(f"inner_model: expected one of {', '.join(_PAGES)}, got {problem.inner_model}")
    kind = OUTPUTS[problem.inner_model]
    found = _forward(list(inputs), problem.inner_model, *_setting(problem))
    return kind(*found[: len(kind._fields)])


@torch.library.custom_op("ttt_lab::triton_forward", mutates_args=())
def _forward(
    inputs: list[Tensor],
    inner_model: str,
    sizes: list[int],
    causal: bool,
    eps: float,
    dtype: str,
    matmul_precision: str,
) -> list[Tensor]:
    """The outputs, and what the backward needs beside the inputs."""
    problem = Problem(inner_model, *sizes, causal, eps, dtype, matmul_precision)  # type: ignore[arg-type]
    outputs, residuals = _PAGES[inner_model].forward(INPUTS[inner_model](*inputs), problem)
    return [*outputs, *(x for x in residuals if isinstance(x, Tensor))]


@_forward.register_fake
def _(inputs, inner_model, sizes, causal, eps, dtype, matmul_precision):
    problem = Problem(inner_model, *sizes, causal, eps, dtype, matmul_precision)
    validate(INPUTS[inner_model](*inputs), INPUTS, problem)
    io, accumulate = inputs[0].dtype, inputs[-1].dtype
    outputs = [
        inputs[0].new_empty(spec.shape, dtype=io if "T" in spec.axes else accumulate)
        for spec in tensor_specs(OUTPUTS[inner_model], problem)
    ]
    saved = [inputs[0].new_empty(shape, dtype=accumulate) for shape in _PAGES[inner_model].saved_shapes(problem)]
    return outputs + saved


@torch.library.custom_op("ttt_lab::triton_backward", mutates_args=())
def _backward(
    cotangents: list[Tensor],
    inputs: list[Tensor],
    saved: list[Tensor],
    inner_model: str,
    sizes: list[int],
    causal: bool,
    eps: float,
    dtype: str,
    matmul_precision: str,
) -> list[Tensor]:
    """The gradient of every input."""
    problem = Problem(inner_model, *sizes, causal, eps, dtype, matmul_precision)  # type: ignore[arg-type]
    page = _PAGES[inner_model]
    residuals = page.residuals(INPUTS[inner_model](*inputs), saved, problem)
    return list(page.backward(OUTPUTS[inner_model](*cotangents), residuals, problem))


@_backward.register_fake
def _(cotangents, inputs, saved, inner_model, sizes, causal, eps, dtype, matmul_precision):
    return [x.new_empty(x.shape) for x in inputs]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, inner_model, *rest = inputs
    ctx.set_materialize_grads(False)  # of what is saved there is none
    ctx.count = len(tensors), len(OUTPUTS[inner_model]._fields)
    ctx.setting = inner_model, *rest
    ctx.save_for_backward(*tensors, *output[ctx.count[1] :])


def _pull(ctx: Any, d_output: list[Tensor | None]) -> tuple[Any, ...]:
    count, width = ctx.count
    inputs, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    inner_model, sizes, causal, eps, dtype, matmul_precision = ctx.setting
    problem = Problem(inner_model, *sizes, causal, eps, dtype, matmul_precision)
    specs = tensor_specs(OUTPUTS[inner_model], problem)
    cotangents = [_laid_out(d, spec, inputs) for d, spec in zip(d_output[:width], specs, strict=True)]
    gradients = _backward(cotangents, list(inputs), list(saved), *ctx.setting)
    return gradients, *[None] * len(ctx.setting)


_forward.register_autograd(_pull, setup_context=_keep)


def _laid_out(d: Tensor | None, spec: TensorSpec, inputs: tuple[Tensor, ...]) -> Tensor:
    """A cotangent as the kernels take it: autograd hands it on in any layout, and zeros as None."""
    if d is None:
        return inputs[0].new_zeros(spec.shape, dtype=inputs[0 if "T" in spec.axes else -1].dtype)
    return d.contiguous()


def _setting(problem: Problem) -> tuple[list[int], bool, float, str, str]:
    """`problem` but for its inner model, as an operator takes it."""
    sizes = [problem.batch, problem.tokens, problem.heads, problem.head_dim, problem.mini_batch]
    return sizes, problem.causal, problem.eps, problem.dtype, problem.matmul_precision
