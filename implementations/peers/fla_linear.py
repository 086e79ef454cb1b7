"""TTT-Linear of flash-linear-attention (tested: 0.6.0).

Its dialect differs from this spec in three things:

    eta[i]  is a learning rate of the token that reads, [B T H 1]; the state is updated with that of the chunk's last
            token. With one lr for all tokens of a mini-batch that is this spec's eta[i, j] = token_eta[i] lr[j].
    scale   multiplies xq in the products, D^-1/2 unless told: here 1.
    output  z + LN(z), not xq + LN(z): z comes from its autograd function, before its output stage, and goes through
            the same LayerNorm kernel (`group_norm`) as in that stage.

ln_weight, ln_bias and eta are handed over in the dtype of xq, as its tests do: its backward does not compile with
fp32 ones beside bf16 views. The fast weights are fp32. The gradient of lr that comes back token by token is that of
the reading tokens: its sum over a mini-batch is the gradient of the mini-batch's one lr.
"""

from __future__ import annotations

from collections.abc import Callable

from fla.modules.layernorm import group_norm
from torch import Tensor

from spec.problem import Problem
from spec.tensors import LinearInputs, LinearOutputs

# (q, k, v, w, b, chunk_size, eta, scale, eps, initial_state, initial_state_bias, output_final_state, cu_seqlens)
ReadOut = Callable[..., tuple[Tensor, Tensor, Tensor]]


def run(read_out: ReadOut, inputs: LinearInputs, problem: Problem) -> LinearOutputs:
    """The outputs by one of its two autograd functions, `read_out`, which gives z and the final state."""
    xq, xk, xv, lr, token_eta, ln_weight, ln_bias, w1, b1 = inputs
    eta = (token_eta.repeat(problem.mini_batches)[:, None] * lr).to(xq.dtype).unsqueeze(-1)  # [B T H 1]
    gamma, beta = ln_weight.to(xq.dtype), ln_bias.to(xq.dtype)
    z, final_w1, final_b1 = read_out(
        xq, xk, xv, gamma, beta, problem.mini_batch, eta, 1.0, problem.eps, w1, b1.unsqueeze(2), True, None
    )
    normed = group_norm(
        z.flatten(2), weight=gamma.flatten(), bias=beta.flatten(), eps=problem.eps, num_groups=problem.heads
    )
    return LinearOutputs(xq + normed.view_as(z), final_w1, final_b1.squeeze(2))
