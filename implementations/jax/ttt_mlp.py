"""TTT-MLP in the dual form, forward and backward written out: the page that kernel authors follow.

One mini-batch, with `eta[i, j] = token_eta[i] lr[j]`; read `ttt_linear.py` first:

    z1, x2, z2 = xk w1 + b1, gelu(z1), x2 w2 + b2
    g_z2   = d(1/2 ||LN(z2) - (xv - xk)||^2) / dz2
    g_z1   = (g_z2 w2^T) * gelu'(z1)
    z1_bar = xq w1 + b1 - (eta * (tril(xq xk^T) + tril(1))) g_z1          causal
    x2_bar = gelu(z1_bar)
    z2_bar = x2_bar w2 + b2 - (eta * (tril(x2_bar x2^T) + tril(1))) g_z2  causal
           (not causal: both layers read the updated weights)
    out    = xq + LN(z2_bar)
    w1', b1' and w2', b2': both layers updated as in TTT-Linear, from (xk, g_z1) and (x2, g_z2)

The steps do one mini-batch of one head; `scan` spreads them over heads, batch and mini-batches.
Source: arXiv 2407.04620, section 2.5; the backward is this repository's.
"""

from __future__ import annotations

from jax import Array

from implementations.jax import blocks, scan
from implementations.jax.scan import MiniBatch, Parameters, Residuals, State
from spec.problem import Problem
from spec.tensors import MlpInputs, MlpOutputs


def forward_step(state: State, batch: MiniBatch, parameters: Parameters, problem: Problem) -> tuple[Array, State]:
    """One mini-batch: (fast weights at its start) -> (out [M D], fast weights after it)."""
    w1, b1, w2, b2 = state
    xq, xk, xv, lr = batch
    token_eta, ln_weight, ln_bias = parameters

    z1 = blocks.dot(xk, w1, problem) + b1  # [M D] @ [D F] -> [M F]
    x2 = blocks.gelu(z1)
    z2 = blocks.dot(x2, w2, problem) + b2  # [M F] @ [F D] -> [M D]
    g_z2, _ = blocks.inner_gradient(z2, xv - xk, ln_weight, ln_bias, problem.eps)
    g_z1 = blocks.dot(g_z2, w2.T, problem) * blocks.gelu_first(z1)  # [M D] @ [D F] -> [M F]
    new_w1, new_b1 = blocks.update(xk, g_z1, lr, token_eta, w1, b1, problem)
    new_w2, new_b2 = blocks.update(x2, g_z2, lr, token_eta, w2, b2, problem)

    if problem.causal:
        x2_bar = blocks.gelu(blocks.read_out(xq, xk, g_z1, lr, token_eta, w1, b1, problem))
        z2_bar = blocks.read_out(x2_bar, x2, g_z2, lr, token_eta, w2, b2, problem)
    else:
        x2_bar = blocks.gelu(blocks.dot(xq, new_w1, problem) + new_b1)
        z2_bar = blocks.dot(x2_bar, new_w2, problem) + new_b2
    out = xq + ln_weight * blocks.normalise(z2_bar, problem.eps).x_hat + ln_bias
    return out, (new_w1, new_b1, new_w2, new_b2)


def backward_step(
    d_state: State, d_out: Array, state: State, batch: MiniBatch, parameters: Parameters, problem: Problem
) -> tuple[State, MiniBatch, Parameters]:
    """One mini-batch, backwards: cotangents of its results -> cotangents of what it started from."""
    d_w1, d_b1, d_w2, d_b2 = d_state
    w1, b1, w2, b2 = state
    xq, xk, xv, lr = batch
    token_eta, ln_weight, ln_bias = parameters

    # The forward again, up to the read-out.
    z1 = blocks.dot(xk, w1, problem) + b1
    x2 = blocks.gelu(z1)
    z2 = blocks.dot(x2, w2, problem) + b2
    g_z2, norm2 = blocks.inner_gradient(z2, xv - xk, ln_weight, ln_bias, problem.eps)
    g_x2 = blocks.dot(g_z2, w2.T, problem)
    g_z1 = g_x2 * blocks.gelu_first(z1)
    if problem.causal:
        z1_bar = blocks.read_out(xq, xk, g_z1, lr, token_eta, w1, b1, problem)
        x2_bar = blocks.gelu(z1_bar)
        z2_bar = blocks.read_out(x2_bar, x2, g_z2, lr, token_eta, w2, b2, problem)
    else:
        new_w1, new_b1 = blocks.update(xk, g_z1, lr, token_eta, w1, b1, problem)
        new_w2, new_b2 = blocks.update(x2, g_z2, lr, token_eta, w2, b2, problem)
        z1_bar = blocks.dot(xq, new_w1, problem) + new_b1
        x2_bar = blocks.gelu(z1_bar)
        z2_bar = blocks.dot(x2_bar, new_w2, problem) + new_b2

    # out = xq + LN(z2_bar)
    norm2_bar = blocks.normalise(z2_bar, problem.eps)
    d_z2_bar, d_ln_weight, d_ln_bias = blocks.layer_norm_backward(d_out, norm2_bar, ln_weight)
    d_xq = d_out

    # The read-out, second layer then first: into the old weights (causal) or the new ones (not causal).
    if problem.causal:
        read = blocks.read_out_backward(d_z2_bar, x2_bar, x2, g_z2, lr, token_eta, w2, problem)
        d_x2_bar, d_x2, d_g_z2, d_lr2, d_token_eta2, d_w2_read, d_b2_read = read
        d_z1_bar = d_x2_bar * blocks.gelu_first(z1_bar)
        read = blocks.read_out_backward(d_z1_bar, xq, xk, g_z1, lr, token_eta, w1, problem)
        d_xq_read, d_xk, d_g_z1, d_lr1, d_token_eta1, d_w1_read, d_b1_read = read
        d_xq = d_xq + d_xq_read
        d_lr, d_token_eta = d_lr1 + d_lr2, d_token_eta1 + d_token_eta2
    else:
        d_z1_bar = blocks.dot(d_z2_bar, new_w2.T, problem) * blocks.gelu_first(z1_bar)
        d_w2 = d_w2 + blocks.dot(x2_bar.T, d_z2_bar, problem)
        d_b2 = d_b2 + d_z2_bar.sum(0)
        d_w1 = d_w1 + blocks.dot(xq.T, d_z1_bar, problem)
        d_b1 = d_b1 + d_z1_bar.sum(0)
        d_xq = d_xq + blocks.dot(d_z1_bar, new_w1.T, problem)
        d_x2 = d_xk = d_g_z2 = d_g_z1 = d_lr = d_token_eta = 0
        d_w2_read = d_b2_read = d_w1_read = d_b1_read = 0

    # The updates of both layers.
    d_xk_up, d_g_z1_up, d_lr_up1, d_token_eta_up1 = blocks.update_backward(d_w1, d_b1, xk, g_z1, lr, token_eta, problem)
    d_x2_up, d_g_z2_up, d_lr_up2, d_token_eta_up2 = blocks.update_backward(d_w2, d_b2, x2, g_z2, lr, token_eta, problem)

    # g_z1 = (g_z2 w2^T) * gelu'(z1)
    d_g_z1 = d_g_z1 + d_g_z1_up
    d_g_x2 = d_g_z1 * blocks.gelu_first(z1)
    d_g_z2 = d_g_z2 + d_g_z2_up + blocks.dot(d_g_x2, w2, problem)  # [M F] @ [F D] -> [M D]

    # The inner gradient, second order: g_z2 depends on z2, on xv - xk and on the LayerNorm's parameters.
    d_z2, d_target, d_ln_weight_in, d_ln_bias_in = blocks.inner_gradient_backward(
        d_g_z2, g_z2, norm2, xv - xk, ln_weight, ln_bias
    )

    # z2 = x2 w2 + b2 and x2 = gelu(z1), which g_z1 reads as well
    d_x2 = d_x2 + d_x2_up + blocks.dot(d_z2, w2.T, problem)
    d_z1 = d_x2 * blocks.gelu_first(z1) + d_g_z1 * g_x2 * blocks.gelu_second(z1)

    # z1 = xk w1 + b1
    d_xk = d_xk + d_xk_up - d_target + blocks.dot(d_z1, w1.T, problem)
    new_d_state = (
        d_w1 + d_w1_read + blocks.dot(xk.T, d_z1, problem),
        d_b1 + d_b1_read + d_z1.sum(0),
        d_w2 + d_w2_read + blocks.dot(x2.T, d_z2, problem) + blocks.dot(g_z2.T, d_g_x2, problem).T,
        d_b2 + d_b2_read + d_z2.sum(0),
    )
    return (
        new_d_state,
        MiniBatch(d_xq, d_xk, d_target, d_lr + d_lr_up1 + d_lr_up2),
        Parameters(
            d_token_eta + d_token_eta_up1 + d_token_eta_up2,
            d_ln_weight + d_ln_weight_in,
            d_ln_bias + d_ln_bias_in,
        ),
    )


def forward(inputs: MlpInputs, problem: Problem) -> tuple[MlpOutputs, Residuals]:
    """Outputs of TTT-MLP, and what `backward` needs.

    Raises:
        ValueError: a tensor has another shape or dtype than `problem` says.
    """
    return scan.forward(forward_step, inputs, problem)


def backward(cotangents: MlpOutputs, residuals: Residuals, problem: Problem) -> MlpInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape or dtype than `problem` says.
    """
    return scan.backward(backward_step, cotangents, residuals, problem)
