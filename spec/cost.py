"""What a problem costs: the fewest bytes and FLOPs of a pass, its memory, the form of the oracle it can afford.

Bytes: every input read once and every output written once, nothing kept between passes but the inputs. FLOPs:
two for each multiply-add of the matrix products of the dual form, elementwise work left out, causal products at
the half they need, nothing recomputed. Both are lower bounds of the operation, not counts of one implementation.
"""

from __future__ import annotations

from typing import Literal

from spec.problem import Pass, Problem
from spec.tensors import INPUTS, OUTPUTS, tensor_specs

Form = Literal["primal", "dual"]
PRIMAL_BYTES = 2**31


def bytes_min(problem: Problem, pass_: Pass) -> int:
    """Bytes that must cross device memory in `pass_`: a backward reads inputs and cotangents, writes gradients."""
    inputs = sum(spec.bytes for spec in tensor_specs(INPUTS[problem.inner_model], problem))
    outputs = sum(spec.bytes for spec in tensor_specs(OUTPUTS[problem.inner_model], problem))
    forward, backward = inputs + outputs, inputs + outputs + inputs
    return {"forward": forward, "backward": backward, "forward_backward": forward + backward}[pass_]


def flops(problem: Problem, pass_: Pass) -> int:
    """Floating-point operations of the matrix products in `pass_`.

    Forward, a token: each layer of the inner model (D x D; or D x F and F x D) is multiplied three times
    (training view, update, test view), the MLP's inner gradient goes once more through its second layer, and a
    causal read-out adds two products with the (M + 1) / 2 tokens before it. The backward does each product twice,
    once for each operand's cotangent.
    """
    d, f, seen = problem.head_dim, problem.hidden, (problem.mini_batch + 1) / 2
    if problem.inner_model == "linear":
        dense, attention = 3 * d * d, 2 * d * seen
    else:
        dense, attention = 3 * 2 * d * f + d * f, 2 * (d + f) * seen
    per_token = 2 * (dense + (attention if problem.causal else 0))
    forward = round(problem.batch * problem.tokens * problem.heads * per_token)
    return {"forward": forward, "backward": 2 * forward, "forward_backward": 3 * forward}[pass_]


def working_bytes(problem: Problem) -> int:
    """Roughly what a forward and a backward hold: fast weights for each mini-batch, a dozen activations, in fp32."""
    d, f = problem.head_dim, problem.hidden
    weights, wide = (d * d, 0) if problem.inner_model == "linear" else (2 * d * f, 4 * f)
    heads = problem.batch * problem.heads
    return 4 * heads * (problem.mini_batches * weights + problem.tokens * (12 * d + wide))


def affordable_form(problem: Problem) -> Form:
    """The form the oracle takes: primal, unless the float64 weights of all tokens would pass `PRIMAL_BYTES`."""
    d, f = problem.head_dim, problem.hidden
    weights = d * d + d if problem.inner_model == "linear" else 2 * d * f + d + f
    return "primal" if 8 * weights * problem.batch * problem.tokens * problem.heads <= PRIMAL_BYTES else "dual"
