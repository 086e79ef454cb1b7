"""The chain over mini-batches, for any inner model: cut, loop, put together again.

`forward_step` and `backward_step` of a page do one mini-batch of every head; this module feeds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from spec.problem import ARRAY_DTYPE, Problem
from spec.tensors import INPUTS, OUTPUTS, Inputs, Outputs, validate

State = tuple[Tensor, ...]  # w1 [B H D D|F], b1 [B H 1 D|F], and for mlp w2, b2
Step = Callable


class MiniBatch(NamedTuple):
    """One mini-batch of every head, in the accumulation dtype."""

    xq: Tensor  # [B H M D]
    xk: Tensor  # [B H M D]
    xv: Tensor  # [B H M D]
    lr: Tensor  # [B H M 1]


class Parameters(NamedTuple):
    """What every mini-batch shares."""

    token_eta: Tensor  # [M 1]
    ln_weight: Tensor  # [H 1 D]
    ln_bias: Tensor  # [H 1 D]


class Residuals(NamedTuple):
    """What the backward needs: the inputs, and the fast weights at the start of every mini-batch."""

    inputs: Inputs
    states: list[State]


@contextmanager
def matmul_mode(problem: Problem) -> Iterator[None]:
    """Let fp32 products use tf32 tensor cores where they are asked for, or where `dot` has rounded the operands."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = problem.dtype in ("bf16", "fp16") or problem.matmul_precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def forward(step: Step, inputs: Inputs, problem: Problem) -> tuple[Outputs, Residuals]:
    """Run `step(state, mini_batch, parameters, problem) -> (out, state)` over all mini-batches, first to last."""
    validate(inputs, INPUTS, problem)
    with matmul_mode(problem):
        batches, parameters, state = _cut(inputs, problem)
        states, outs = [], []
        for batch in batches:
            states.append(state)
            out, state = step(state, batch, parameters, problem)
            outs.append(out)
    outputs = OUTPUTS[problem.inner_model](_join(outs, problem), *_join_state(state))
    return outputs, Residuals(inputs, states)


def backward(step: Step, cotangents: Outputs, residuals: Residuals, problem: Problem) -> Inputs:
    """Run `step(d_state, d_out, state, mini_batch, parameters, problem)` over all mini-batches, last to first.

    A step gives (d_state, d_mini_batch, d_parameters); the gradients of the parameters are summed over heads,
    batch and mini-batches as their shapes say.
    """
    validate(cotangents, OUTPUTS, problem)
    with matmul_mode(problem):
        batches, parameters, _ = _cut(residuals.inputs, problem)
        d_outs = _cut_tokens(cotangents.out, problem)
        d_state = _cut_state(cotangents[1:])
        d_batches, d_parameters = [], Parameters(*(torch.zeros_like(p) for p in parameters))
        for state, batch, d_out in zip(residuals.states[::-1], batches[::-1], d_outs[::-1], strict=True):
            d_state, d_batch, d_shared = step(d_state, d_out, state, batch, parameters, problem)
            d_batches.append(d_batch)
            d_parameters = Parameters(
                *(d + s.sum_to_size(d.shape) for d, s in zip(d_parameters, d_shared, strict=True))
            )
    d_xq, d_xk, d_xv, d_lr = (_join(d, problem) for d in zip(*d_batches[::-1], strict=True))
    return INPUTS[problem.inner_model](
        d_xq,
        d_xk,
        d_xv,
        d_lr.squeeze(-1),
        d_parameters.token_eta.squeeze(-1),
        d_parameters.ln_weight.squeeze(-2),
        d_parameters.ln_bias.squeeze(-2),
        *_join_state(d_state),
    )


def _cut(inputs: Inputs, problem: Problem) -> tuple[list[MiniBatch], Parameters, State]:
    columns = [_cut_tokens(x, problem) for x in (inputs.xq, inputs.xk, inputs.xv, inputs.lr.unsqueeze(-1))]
    batches = [MiniBatch(*tokens) for tokens in zip(*columns, strict=True)]
    parameters = Parameters(
        inputs.token_eta.unsqueeze(-1), inputs.ln_weight.unsqueeze(-2), inputs.ln_bias.unsqueeze(-2)
    )
    return batches, parameters, _cut_state(inputs[7:])


def _cut_tokens(x: Tensor, problem: Problem) -> list[Tensor]:
    """[B T H D] -> N times [B H M D], in the accumulation dtype."""
    cut = x.unflatten(1, (problem.mini_batches, problem.mini_batch)).transpose(2, 3)
    return list(cut.to(getattr(torch, ARRAY_DTYPE[problem.accumulate_dtype])).unbind(1))


def _join(parts: Sequence[Tensor], problem: Problem) -> Tensor:
    """N times [B H M D] -> [B T H D], in the problem's dtype."""
    return torch.stack(parts, 1).transpose(2, 3).flatten(1, 2).to(getattr(torch, ARRAY_DTYPE[problem.dtype]))


def _cut_state(tensors: tuple[Tensor, ...]) -> State:
    """Biases gain the row axis that the steps broadcast over."""
    return tuple(x.unsqueeze(-2) if x.dim() == 3 else x for x in tensors)


def _join_state(state: State) -> State:
    return tuple(x.squeeze(-2) if i % 2 else x for i, x in enumerate(state))
