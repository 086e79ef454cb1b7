"""TTT-Linear in the dual form, forward and backward written out: the page that kernel authors follow.

One mini-batch, with `eta[i, j] = token_eta[i] lr[j]`:

    z1     = xk w1 + b1
    g_z1   = d(1/2 ||LN(z1) - (xv - xk)||^2) / dz1
    z1_bar = xq w1 + b1 - (eta * (tril(xq xk^T) + tril(1))) g_z1      causal
           = xq w1' + b1'                                             not causal
    out    = xq + LN(z1_bar)
    w1'    = w1 - token_eta[M-1] (lr xk)^T g_z1
    b1'    = b1 - token_eta[M-1] sum_j lr_j g_z1_j

The steps do one mini-batch of one head; `scan` spreads them over heads, batch and mini-batches.
Source: arXiv 2407.04620, section 2.5; the backward is this repository's.
"""

from __future__ import annotations

from jax import Array

from implementations.jax import blocks, scan
from implementations.jax.scan import MiniBatch, Parameters, Residuals, State
from spec.problem import Problem
from spec.tensors import LinearInputs, LinearOutputs


def forward_step(state: State, batch: MiniBatch, parameters: Parameters, problem: Problem) -> tuple[Array, State]:
    """One mini-batch: (fast weights at its start) -> (out [M D], fast weights after it)."""
    w1, b1 = state
    xq, xk, xv, lr = batch
    token_eta, ln_weight, ln_bias = parameters

    z1 = blocks.dot(xk, w1, problem) + b1  # [M D] @ [D D] -> [M D]
    g_z1, _ = blocks.inner_gradient(z1, xv - xk, ln_weight, ln_bias, problem.eps)
    new_w1, new_b1 = blocks.update(xk, g_z1, lr, token_eta, w1, b1, problem)

    if problem.causal:
        z1_bar = blocks.read_out(xq, xk, g_z1, lr, token_eta, w1, b1, problem)
    else:
        z1_bar = blocks.dot(xq, new_w1, problem) + new_b1
    out = xq + ln_weight * blocks.normalise(z1_bar, problem.eps).x_hat + ln_bias
    return out, (new_w1, new_b1)


def backward_step(
    d_state: State, d_out: Array, state: State, batch: MiniBatch, parameters: Parameters, problem: Problem
) -> tuple[State, MiniBatch, Parameters]:
    """One mini-batch, backwards: cotangents of its results -> cotangents of what it started from."""
    d_w1, d_b1 = d_state
    w1, b1 = state
    xq, xk, xv, lr = batch
    token_eta, ln_weight, ln_bias = parameters

    # The forward again, up to the read-out.
    z1 = blocks.dot(xk, w1, problem) + b1
    g_z1, norm1 = blocks.inner_gradient(z1, xv - xk, ln_weight, ln_bias, problem.eps)
    if problem.causal:
        z1_bar = blocks.read_out(xq, xk, g_z1, lr, token_eta, w1, b1, problem)
    else:
        new_w1, new_b1 = blocks.update(xk, g_z1, lr, token_eta, w1, b1, problem)
        z1_bar = blocks.dot(xq, new_w1, problem) + new_b1

    # out = xq + LN(z1_bar)
    norm1_bar = blocks.normalise(z1_bar, problem.eps)
    d_z1_bar, d_ln_weight, d_ln_bias = blocks.layer_norm_backward(d_out, norm1_bar, ln_weight)
    d_xq = d_out

    # The read-out: into the old weights (causal) or the new ones (not causal).
    if problem.causal:
        read = blocks.read_out_backward(d_z1_bar, xq, xk, g_z1, lr, token_eta, w1, problem)
        d_xq_read, d_xk, d_g_z1, d_lr, d_token_eta, d_w1_read, d_b1_read = read
        d_xq = d_xq + d_xq_read
    else:
        d_xq = d_xq + blocks.dot(d_z1_bar, new_w1.T, problem)
        d_w1 = d_w1 + blocks.dot(xq.T, d_z1_bar, problem)
        d_b1 = d_b1 + d_z1_bar.sum(0)
        d_xk = d_g_z1 = d_lr = d_token_eta = d_w1_read = d_b1_read = 0

    # The update.
    d_xk_up, d_g_z1_up, d_lr_up, d_token_eta_up = blocks.update_backward(d_w1, d_b1, xk, g_z1, lr, token_eta, problem)

    # The inner gradient, second order: g_z1 depends on z1, on xv - xk and on the LayerNorm's parameters.
    d_z1, d_target, d_ln_weight_in, d_ln_bias_in = blocks.inner_gradient_backward(
        d_g_z1 + d_g_z1_up, g_z1, norm1, xv - xk, ln_weight, ln_bias
    )

    # z1 = xk w1 + b1
    d_xk = d_xk + d_xk_up - d_target + blocks.dot(d_z1, w1.T, problem)
    d_w1 = d_w1 + d_w1_read + blocks.dot(xk.T, d_z1, problem)
    d_b1 = d_b1 + d_b1_read + d_z1.sum(0)
    return (
        (d_w1, d_b1),
        MiniBatch(d_xq, d_xk, d_target, d_lr + d_lr_up),
        Parameters(d_token_eta + d_token_eta_up, d_ln_weight + d_ln_weight_in, d_ln_bias + d_ln_bias_in),
    )


def forward(inputs: LinearInputs, problem: Problem) -> tuple[LinearOutputs, Residuals]:
    """Outputs of TTT-Linear, and what `backward` needs.

    Raises:
        ValueError: a tensor has another shape or dtype than `problem` says.
    """
    return scan.forward(forward_step, inputs, problem)


def backward(cotangents: LinearOutputs, residuals: Residuals, problem: Problem) -> LinearInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape or dtype than `problem` says.
    """
    return scan.backward(backward_step, cotangents, residuals, problem)
