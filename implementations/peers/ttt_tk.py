"""TTT-MLP of ttt-tk (`test-time-training` on PyPI, tested: 0.9.0): ThunderKittens kernels for Hopper, not causal.

Its dialect: bf16 views as [B H N M D], the last row of eta as bf16 [B H N M 1], fp32 LayerNorm parameters and fast
weights, D = M = 64. It keeps the fast weights in front of every G-th mini-batch, and computes the rest again on the
way back, into buffers that the caller hands over. It does not return the fast weights after the last token: here
they are those in front of one more mini-batch, of zeros, whose output is thrown away.

Only the last row of eta is read, so the gradient of the other entries of token_eta is 0, as the spec has it. The
copies between B T H D and its own layout, the extra mini-batch and the buffers are part of every time measured here.

Its wheel brings the driver's library of version 550 along. The installed driver's is loaded for everybody before it, so
that its tensor maps are made by the driver that runs; else they fail unseen ("initialization error" on its standard
error), and its kernels end in an illegal instruction.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import NamedTuple

with contextlib.suppress(OSError):  # without a driver there is no GPU to run on either
    ctypes.CDLL("libcuda.so.1", ctypes.RTLD_GLOBAL)
import test_time_training
import torch
from torch import Tensor

from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, MlpInputs, MlpOutputs, validate

GROUP = 4  # mini-batches between two states that are kept, as in its test of the backward


class Residuals(NamedTuple):
    """What its backward reads: its own tensors of the forward, and what the mapping back needs."""

    inputs: MlpInputs
    views: tuple[Tensor, ...]  # xq, xk, xv [B H N M D]
    last_eta: Tensor  # [B H N M 1]
    norm: tuple[Tensor, Tensor]  # [1 H 1 D]
    checkpoints: tuple[Tensor, ...]  # w1, b1, w2, b2 [B H N/G ...]
    out: Tensor  # [B H N M D]


def forward(inputs: MlpInputs, problem: Problem) -> tuple[MlpOutputs, Residuals]:
    """Outputs of TTT-MLP, and what `backward` needs.

    Raises:
        ValueError: a tensor has another shape or dtype than `problem` says.
        NotImplementedError: the GPU is no Hopper.
    """
    validate(inputs, INPUTS, problem)
    if torch.cuda.get_device_capability(inputs.xq.device)[0] != 9:
        raise NotImplementedError("test-time-training is compiled for Hopper (sm_90a) alone")
    n, size = problem.mini_batches, group_size(problem.mini_batches)
    xq, xk, xv, eta = (_split(x, problem) for x in (*inputs[:3], inputs.token_eta[-1] * inputs.lr.unsqueeze(-1)))
    views, last_eta = (xq, xk, xv), eta.bfloat16()
    norm = tuple(x[None, :, None].contiguous() for x in (inputs.ln_weight, inputs.ln_bias))
    state = tuple(x.contiguous() for x in _with_rows(inputs[7:]))
    checkpoints = tuple(x.new_empty(*x.shape[:2], n // size + 1, *x.shape[2:]) for x in state)
    out = torch.empty_like(_longer(xq))
    test_time_training.ttt_forward(*map(_longer, (*views, last_eta)), *norm, *state, *checkpoints, out, size)
    final_w1, final_b1, final_w2, final_b2 = (x[:, :, -1].clone() for x in checkpoints)
    outputs = MlpOutputs(_join(out[:, :, :n]), final_w1, final_b1.squeeze(2), final_w2, final_b2.squeeze(2))
    kept = tuple(x[:, :, :-1].contiguous() for x in checkpoints)
    return outputs, Residuals(inputs, views, last_eta, norm, kept, out[:, :, :n].contiguous())


def backward(cotangents: MlpOutputs, residuals: Residuals, problem: Problem) -> MlpInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape or dtype than `problem` says.
    """
    validate(cotangents, OUTPUTS, problem)
    inputs, views, last_eta, norm, checkpoints, out = residuals
    size = group_size(problem.mini_batches)
    d_state = tuple(x.contiguous() for x in _with_rows(cotangents[1:]))
    d_norm = tuple(x.new_zeros(problem.batch, *x.shape[1:]) for x in norm)
    d_first = tuple(map(torch.zeros_like, d_state))
    d_last_eta, d_xq, d_xk, d_xv = map(torch.zeros_like, (last_eta, *views))
    test_time_training.ttt_backward(
        *views,
        last_eta,
        *norm,
        *checkpoints,
        out,
        *_buffers(size, problem, out.device),
        *d_state,
        _split(cotangents.out, problem),
        *d_norm,
        *d_first,
        d_last_eta,
        d_xq,
        d_xk,
        d_xv,
        size,
    )
    d_eta = _join(d_last_eta).squeeze(-1).float()  # [B T H], of token_eta[M - 1] lr
    d_token_eta = torch.zeros_like(inputs.token_eta)
    d_token_eta[-1] = (d_eta * inputs.lr).sum()
    d_w1, d_b1, d_w2, d_b2 = d_first
    return MlpInputs(
        *map(_join, (d_xq, d_xk, d_xv)),
        (d_eta * inputs.token_eta[-1]).to(inputs.lr.dtype),
        d_token_eta,
        *(x.sum(0).squeeze(1) for x in d_norm),
        d_w1,
        d_b1.squeeze(2),
        d_w2,
        d_b2.squeeze(2),
    )


def group_size(mini_batches: int) -> int:
    """The largest divisor of `mini_batches` that is not above `GROUP`: the final state must come at a checkpoint."""
    return max(size for size in range(1, GROUP + 1) if mini_batches % size == 0)


def _buffers(size: int, problem: Problem, device: torch.device) -> list[Tensor]:
    """Room for what the backward computes again, a group of mini-batches at a time, in the order of its arguments."""
    m, d, f = problem.mini_batch, problem.head_dim, problem.hidden
    fp32, bf16 = torch.float32, torch.bfloat16
    shapes = [
        *((fp32, d, f), (fp32, 1, f), (fp32, f, d), (fp32, 1, d)),  # w1, b1, w2, b2 in front of each mini-batch
        *((bf16, m, d), (fp32, m, 1)),  # x_hat and std of the output's LayerNorm
        *((bf16, m, f),) * 4,  # X2, Z1, Z1_bar, X2_bar
        *((bf16, m, d), (bf16, m, f)),  # g_z2, g_z1
        *((bf16, m, d),) * 3,  # x_hat, its cotangent and the error of the inner LayerNorm
        (fp32, m, 1),  # its std
    ]
    heads = problem.batch, problem.heads, size
    return [torch.zeros(*heads, rows, columns, dtype=dtype, device=device) for dtype, rows, columns in shapes]


def _with_rows(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Biases gain a row axis."""
    return tuple(x.unsqueeze(2) if x.dim() == 3 else x for x in state)


def _split(x: Tensor, problem: Problem) -> Tensor:
    """[B T H ...] -> [B H N M ...]."""
    return x.unflatten(1, (problem.mini_batches, problem.mini_batch)).movedim(3, 1).contiguous()


def _join(x: Tensor) -> Tensor:
    """[B H N M ...] -> [B T H ...]."""
    return x.movedim(1, 3).flatten(1, 2).contiguous()


def _longer(x: Tensor) -> Tensor:
    """With one more mini-batch, of zeros."""
    return torch.cat((x, x.new_zeros(*x.shape[:2], 1, *x.shape[3:])), 2)
