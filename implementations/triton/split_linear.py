"""TTT-Linear in Triton with nothing but the recurrence left in the sequential loop.

What it changes against `ttt_linear`: only w -> z1 -> LayerNorm gradient -> w' must go mini-batch by mini-batch, and
backwards only d_w' -> d_lr_g -> d_z1 -> d_w. Two kernels with one program a chain do that and no more; the rest is done
by kernels with one program for every chunk of C = R M tokens of every chain:

    forward    split_recurrence          w, b at the start of each chunk, lr g_z1 of each token
               split_read_out            z1_bar = xq w + b - (eta * (xq xk^T + 1)) (lr g_z1) of a chunk, and out
    backward   split_recurrence          again, of one segment of G mini-batches at a time, from the last to the first
               split_read_out_backward   d_xq, and all that reaches w and lr g_z1 of the chunk through the read-out
               split_reverse_recurrence  d_lr_g of each token, d_w and d_b at the end of each chunk
               split_update_backward     d_xk, d_xv, d_lr
               split_sums                d_ln_weight, d_ln_bias, d_token_eta from the parts that the chunks wrote

Where M >= 64 the recurrences are those of `split_wide`: a chunk is one mini-batch, whose w is stored, and what the
second order needs of it, and lr g_z1, is computed from that w again by the kernels of the chunks, off the chain.

In the read-out of a chunk eta[i, j] is token_eta[i] within a mini-batch (j <= i), token_eta[M-1] where j's mini-batch
comes before i's, else 0: the dual form holds for any number of mini-batches once their gradients are known. At M = 16
the products then are over 64 tokens, and D^2 numbers of fast weights are stored a chunk, not a mini-batch. The same
trick gives d_xk its w at the start and its d_w at the end of each mini-batch.

Two identities shorten the loop. The LayerNorm sees z1 less its mean over D, and g_z1 sums to zero over D: the mean of
w1 and b1 over their last axis never moves. It is taken off at the start and put back at the end; z1 has mean zero, and
var = mean(z1^2). And with c = ln_weight (ln_bias - target) less its mean,

    g_z1 = rstd (x_hat (ln_weight^2 - q) + c - rstd mean(ln_weight^2 z1))
    q = mean(p x_hat) = rstd^2 mean(ln_weight^2 z1^2) + rstd mean(c z1)

four sums over z1 that one reduction takes together. The second order likewise, of v = lr d_lr_g, with mean(v) = 0 and
y = 2 ln_weight^2 x_hat + c:

    d_z1 = rstd^2 ((ln_weight^2 - q) v - a y - (mean(ln_weight^2 v) - a q1) - x_hat (mean(v y) - a q3))
    a = mean(v x_hat), q1 = mean(y), q3 = mean(ln_weight^2 x_hat^2) + 3 q

Segments run on three streams (`lanes`), three of them at once in a backward: the recurrences leave most of the card
idle, and the chunks of one segment run while the next one is under way. Beside the kernels of the chunks a recurrence
is up to twice as slow, and they are too: on lm-1.3b, with two segments, overlap is worth 4% of a forward and backward.

Measured on one H100, bf16, calls behind a spin (development runs of 2026-11-24). Recurrence alone, us a mini-batch:
0.78 to 0.82 at M = 16 (lm-1.3b); 1.9 at M = 64 (video-5b), 2.2 in one loop for every M before. What made it faster:
sums across warps as a product with ones; loads two steps ahead (three stages, not two); lr, too small for an
asynchronous copy, by way of two heads at once (0.97 before: likely its load held up the fences of the step). The wide
recurrence takes 1.9 or 2.9 us, likely as one or two programs run on a multiprocessor, which they share with the chunks
of the segment before: a forward keeps them apart, and video-5b takes 0.61 instead of 0.74 ms.

Memory, bytes a token and head at D = 64 in bf16 (`saved_bytes`, `workspace_bytes`), beside 386 of inputs:

    G M tokens                     1024   4096   16384
    saved for the backward         15.7    3.6     0.5   lm-1.3b-long (T = 32768)
    held while a backward runs      125    497    1325   the buffers of three segments, of two in the last column
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from implementations.kernels import TritonKernel, once
from implementations.triton.arguments import Shared, State, check, empty, tokens, view
from implementations.triton.lanes import Step, run
from implementations.triton.launch import Launch, meta
from implementations.triton.limits import block_d, split_limit
from implementations.triton.split_backward import (
    Pulled,
    split_read_out_backward,
    split_reverse_recurrence,
    split_update_backward,
)
from implementations.triton.split_forward import Kept, Segment, split_read_out, split_recurrence
from implementations.triton.split_sums import Parts, split_sums
from implementations.triton.split_wide import split_recurrence_wide, split_reverse_recurrence_wide
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, LinearInputs, LinearOutputs

# Tokens between two saved states unless told otherwise: two segments are the fewest that overlap.
LEAST, MOST = 1024, 4096
SMS = 132  # of an H100
BUFFERS = 3  # segments of a backward under way at once


class Residuals(NamedTuple):
    """What the backward needs: the inputs, and the fast weights at the start of every segment but the first."""

    inputs: LinearInputs
    saved_w1: Tensor  # [segments - 1, B, H, D, D]
    saved_b1: Tensor  # [segments - 1, B, H, D]
    group: int


class _Sizes(NamedTuple):
    """Of one call: R mini-batches a chunk, and the mini-batches of every segment."""

    per_chunk: int
    segments: tuple[tuple[int, int], ...]  # (first mini-batch, how many)

    @property
    def longest(self) -> int:
        return max(count for _, count in self.segments)


def _sizes(problem: Problem, group: int) -> _Sizes:
    per_chunk = max(1, 64 // problem.mini_batch)
    while problem.mini_batches % per_chunk or group % per_chunk:
        per_chunk //= 2
    n = problem.mini_batches
    return _Sizes(per_chunk, tuple((first, min(group, n - first)) for first in range(0, n, group)))


class _Setting(NamedTuple):
    """How the kernels are compiled for one size; warps, and stages of the loops."""

    recurrence: tuple[int, int]
    recompute: tuple[int, int]  # the recurrence in a backward
    reverse: tuple[int, int]
    read_out: int
    read_out_backward: int
    update_backward: int


def _setting(problem: Problem) -> _Setting:
    d, m = block_d(problem), problem.mini_batch
    if max(d, m) <= 64:
        # Eight stages take more than half of an SM's shared memory: no two of a few programs meet there.
        alone = is_wide(problem) and problem.dtype != "fp32" and problem.batch * problem.heads <= SMS
        return _Setting((4, 8 if alone else 3), (4, 3), (4, 3), 4, 4, 4)
    stages = 3 if d * m <= 64 * 64 else 2 if d * m <= 128 * 64 else 1
    return _Setting((8, stages), (8, stages), (8, stages), 8, 8, 8)


def is_wide(problem: Problem) -> bool:
    """Whether the recurrences are those of `split_wide`: a chunk is then a mini-batch."""
    return problem.mini_batch >= 64


def default_group(problem: Problem) -> int:
    """G: half of the tokens, but at least 1024 and at most 4096 of them; in mini-batches."""
    tokens_apart = max(LEAST, min(MOST, problem.tokens // 2))
    chunk = max(1, 64 // problem.mini_batch)
    return max(1, tokens_apart // problem.mini_batch // chunk) * chunk


def saved_bytes(problem: Problem, group: int) -> float:
    """What a forward keeps for its backward beside the inputs, a token and head."""
    states = len(_sizes(problem, group).segments) - 1
    return states * 4 * (problem.head_dim**2 + problem.head_dim) / problem.tokens


def workspace_bytes(problem: Problem, group: int) -> float:
    """What a backward holds while it runs beside inputs and gradients, a token and head."""
    like = meta(LinearInputs, problem).xq
    sizes = _sizes(problem, group)
    buffers = [_buffers(like, problem, sizes) for _ in sizes.segments[:BUFFERS]]
    total = sum(x.nbytes for buffer in buffers for kind in buffer for x in kind if x is not like)
    return total / (problem.batch * problem.heads * problem.tokens)


def forward(inputs: LinearInputs, problem: Problem, group: int | None = None) -> tuple[LinearOutputs, Residuals]:
    """Outputs of TTT-Linear, and what `backward` needs; `group` is G, mini-batches between two saved states.

    Raises:
        ValueError: `problem` is beyond the limits of the Triton pages, or a tensor does not fit it or the kernels.
    """
    check(inputs, INPUTS, problem)
    if reason := split_limit(problem):
        raise ValueError(reason)
    group = default_group(problem) if group is None else group
    if group < 1:
        raise ValueError(f"group: expected at least 1 mini-batch between saved states, got {group}")
    outputs, residuals, steps = plan_forward(inputs, problem, group)
    run(steps, inputs.xq.device)
    return outputs, residuals


def backward(cotangents: LinearOutputs, residuals: Residuals, problem: Problem) -> LinearInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent does not fit `problem` or the kernels.
    """
    check(cotangents, OUTPUTS, problem, residuals.inputs.xq.device)
    gradients, steps = plan_backward(cotangents, residuals, problem)
    run(steps, cotangents.out.device)
    return gradients._replace(token_eta=gradients.token_eta.sum(0))


def saved_shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Of what `forward` saves beside the inputs, all fp32."""
    states = len(_sizes(problem, default_group(problem)).segments) - 1
    b, h, d = problem.batch, problem.heads, problem.head_dim
    return (states, b, h, d, d), (states, b, h, d)


def residuals(inputs: LinearInputs, saved: list[Tensor], problem: Problem) -> Residuals:
    """What `forward` saved, as `backward` takes it."""
    return Residuals(inputs, *saved, default_group(problem))


def plan_forward(inputs: LinearInputs, problem: Problem, group: int) -> tuple[LinearOutputs, Residuals, list[Step]]:
    """What `forward` gives, and the launches that fill it."""
    b, t, h, d = inputs.xq.shape
    like, sizes = inputs.xq, _sizes(problem, group)
    outputs = LinearOutputs(empty(like, b, t, h, d, dtype=like.dtype), empty(like, b, h, d, d), empty(like, b, h, d))
    states = len(sizes.segments) - 1
    residuals = Residuals(inputs, empty(like, states, b, h, d, d), empty(like, states, b, h, d), group)
    segments = [_segment(like, problem, sizes) for _ in sizes.segments[:2]]  # one is read while the next is written
    common = {"inputs": tokens(*inputs[:4]), "shared": Shared(*inputs[4:7])}
    steps: list[Step] = []
    for number, span in enumerate(sizes.segments):
        segment = segments[number % 2]
        end = State(*outputs[1:]) if number == states else _saved(residuals, number + 1)
        recur = _recur(residuals, problem, sizes, number, end, segment, None)
        read = _launch_chunks(
            split_read_out,
            problem,
            sizes,
            span,
            {**common, "segment": segment, "out": view(outputs.out), "heads": h},
            EPS=problem.eps,
        )
        at = len(steps)
        steps.append(Step(recur, 1 if states else 0, (at - 3,) if number > 1 else ()))
        steps.append(Step(read, 0, (at,)))
    return outputs, residuals, steps


def plan_backward(cotangents: LinearOutputs, residuals: Residuals, problem: Problem) -> tuple[LinearInputs, list[Step]]:
    """The gradients, that of token_eta still of each head, [H, M], and the launches that fill them."""
    inputs, sizes = residuals.inputs, _sizes(problem, residuals.group)
    b, t, h, d = inputs.xq.shape
    like, c = inputs.xq, sizes.per_chunk * problem.mini_batch
    chunks = t // c
    gradients = LinearInputs(
        *(empty(like, b, t, h, d, dtype=like.dtype) for _ in range(3)),
        empty(like, b, t, h, dtype=like.dtype),
        empty(like, h, problem.mini_batch),
        *(empty(like, h, d) for _ in range(2)),
        empty(like, b, h, d, d),
        empty(like, b, h, d),
    )
    shape = b, h, chunks
    parts = Parts(
        empty(like, *shape, problem.mini_batch), empty(like, 2, *shape), *(empty(like, 2, *shape, d) for _ in range(2))
    )
    buffers = [_buffers(like, problem, sizes) for _ in sizes.segments[:BUFFERS]]
    spent = State(empty(like, b, h, d, d), empty(like, b, h, d))  # the state that recomputing ends with
    common = {"inputs": tokens(*inputs[:4]), "shared": Shared(*inputs[4:7]), "heads": h}
    written = {"d_inputs": tokens(*gradients[:4]), "parts": parts, "all_chunks": chunks, "chains": b * h}
    many = len(sizes.segments) > 1
    steps: list[Step] = []
    updates: list[int] = []  # steps that free the buffers of a segment
    waiting: list[Step] = []  # its update waits for a step on another lane: the next read-out goes before it
    d_state = State(*cotangents[1:])
    for number, span in reversed(list(enumerate(sizes.segments))):
        segment, kept, pulled = buffers[number % BUFFERS]
        update = (updates[1 - BUFFERS],) if len(updates) >= BUFFERS - 1 else ()
        d_start = State(*gradients[7:]) if number == 0 else State(empty(like, b, h, d, d), empty(like, b, h, d))
        steps.append(Step(_recur(residuals, problem, sizes, number, spent, segment, kept), 1 if many else 0, update))
        arguments = {**common, "segment": segment, "kept": kept, "pulled": pulled, **written}
        read = arguments | {"d_out": view(cotangents.out)}
        launch = _launch_chunks(split_read_out_backward, problem, sizes, span, read, EPS=problem.eps)
        steps.append(Step(launch, 0, (len(steps) - 1,)))
        reverse = _reverse(common, kept, pulled, d_state, d_start, problem, sizes, span)
        steps.append(Step(reverse, 2 if many else 0, (len(steps) - 1,)))
        updates += [len(steps)] * len(waiting)
        steps += waiting
        after = len(steps) - 1 - len(waiting)
        change = _launch_chunks(split_update_backward, problem, sizes, span, arguments, EPS=problem.eps)
        waiting = [Step(change, 0, (after,))]
        d_state = d_start
    return gradients, [*steps, *waiting, Step(_sums(parts, gradients, problem, sizes))]


def _sums(parts: Parts, gradients: LinearInputs, problem: Problem, sizes: _Sizes) -> Launch:
    arguments = {
        "parts": parts,
        "d_token_eta": gradients.token_eta,
        "d_ln_weight": gradients.ln_weight,
        "d_ln_bias": gradients.ln_bias,
        "batch": problem.batch,
        "heads": problem.heads,
        "chunks": problem.mini_batches // sizes.per_chunk,
    }
    constants = _constants(problem, sizes)
    read = problem.causal or sizes.per_chunk > 1
    constants = {name: constants[name] for name in ("D", "BLOCK_D", "M")} | {"READ": read, "ROWS": 64}
    return Launch(split_sums, 3 * problem.heads, arguments, constants, {"num_warps": 8})


def _buffers(like: Tensor, problem: Problem, sizes: _Sizes) -> tuple[Segment, Kept, Pulled]:
    """Memory that the kernels of one segment use."""
    b, h, d = problem.batch, problem.heads, problem.head_dim
    rows, chunks = (b, h, sizes.longest * problem.mini_batch), sizes.longest // sizes.per_chunk
    # x_hat unrounded: where the inner loss is nearly 0, g_z1 is what is left of x_hat when most of it cancels. Where
    # chunks are mini-batches, it is computed again for that.
    x_hat = empty(like, *rows, d, dtype=like.dtype if is_wide(problem) else torch.float32)
    kept = Kept(x_hat, empty(like, *rows, d, dtype=like.dtype), empty(like, *rows, 8))
    # A read-out of the weights after its chunk sends nothing to lr g_z1: another tensor stands in for what is not used.
    part = empty(like, *rows, d, dtype=like.dtype) if problem.causal or not is_wide(problem) else like
    pulled = Pulled(
        empty(like, b, h, chunks, d, d),
        empty(like, b, h, chunks, d),
        part,
        empty(like, *rows, d, dtype=like.dtype),
        empty(like, b, h, chunks, d, d, dtype=like.dtype),
        empty(like, b, h, chunks, d),
    )
    return _segment(like, problem, sizes), kept, pulled


def _reverse(
    common: dict[str, Any], kept: Kept, pulled: Pulled, d_end: State, d_start: State, problem: Problem, sizes: _Sizes,
    span: tuple[int, int],
) -> Launch:  # fmt: skip
    first, mini_batches = span
    of_segment = {"d_end": d_end, "d_start": d_start, "first": first, "mini_batches": mini_batches}
    arguments = {**common, "kept": kept, "pulled": pulled, **of_segment}
    setting = _setting(problem)
    constants = _constants(problem, sizes) | {"CAUSAL": problem.causal}
    if is_wide(problem):
        del constants["C"]
        return _launch_chains(split_reverse_recurrence_wide, problem, arguments, constants, *setting.reverse)
    return _launch_chains(split_reverse_recurrence, problem, arguments, constants, *setting.reverse)


def _saved(residuals: Residuals, number: int) -> State:
    """The fast weights at the start of a segment."""
    if number == 0:
        return State(*residuals.inputs[7:])
    return State(residuals.saved_w1[number - 1], residuals.saved_b1[number - 1])


def _segment(like: Tensor, problem: Problem, sizes: _Sizes) -> Segment:
    b, h, d = problem.batch, problem.heads, problem.head_dim
    chunks = sizes.longest // sizes.per_chunk
    return Segment(
        empty(like, b, h, chunks + 1, d, d, dtype=like.dtype),
        empty(like, b, h, chunks + 1, d),
        like if is_wide(problem) else empty(like, b, h, sizes.longest * problem.mini_batch, d, dtype=like.dtype),
    )


def _paired(lr: Tensor) -> bool:
    """Whether two heads of every token lie in four aligned bytes."""
    strides = lr.stride(0), lr.stride(1), lr.shape[2], lr.storage_offset()
    return lr.element_size() == 2 and lr.stride(2) == 1 and not any(number % 2 for number in strides)


def _recur(
    residuals: Residuals, problem: Problem, sizes: _Sizes, number: int, end: State, segment: Segment, kept: Kept | None
) -> Launch:
    inputs, (first, mini_batches) = residuals.inputs, sizes.segments[number]
    nothing = Kept(*[inputs.token_eta] * 3)
    arguments = {
        "inputs": tokens(*inputs[:4]),
        "shared": Shared(*inputs[4:7]),
        "start": _saved(residuals, number),
        "end": end,
        "segment": segment,
        "kept": nothing if kept is None else kept,
        "heads": problem.heads,
        "first": first,
        "mini_batches": mini_batches,
    }
    loop = _setting(problem).recurrence if kept is None else _setting(problem).recompute
    constants = _constants(problem, sizes) | {"EPS": problem.eps, "PAIRED": _paired(inputs.lr)}
    if is_wide(problem):
        del arguments["kept"], constants["C"]
        return _launch_chains(split_recurrence_wide, problem, arguments, constants, *loop)
    keep, after = kept is not None, not problem.causal and sizes.per_chunk == 1  # then the read-out needs w alone
    constants |= {"KEEP": keep, "LR_G": keep or not after}
    return _launch_chains(split_recurrence, problem, arguments, constants, *loop)


def _launch_chains(
    kernel: Any, problem: Problem, arguments: dict[str, Any], constants: dict[str, Any], warps: int, stages: int
) -> Launch:
    """One program for each chain."""
    options = {"num_warps": warps, "num_stages": stages}
    return Launch(kernel, problem.batch * problem.heads, arguments, constants | {"STAGES": stages}, options)


def _launch_chunks(
    kernel: Any, problem: Problem, sizes: _Sizes, span: tuple[int, int], arguments: dict[str, Any], **constants: Any
) -> Launch:
    """One program for each chunk of a segment."""
    first, chunks = (count // sizes.per_chunk for count in span)
    return Launch(
        kernel,
        problem.batch * problem.heads * chunks,
        arguments | {"first": first, "chunks": chunks},
        _constants(problem, sizes) | {"CAUSAL": problem.causal, "WIDE": is_wide(problem)} | constants,
        {"num_warps": getattr(_setting(problem), kernel.__name__.removeprefix("split_"))},
    )


def _constants(problem: Problem, sizes: _Sizes) -> dict[str, Any]:
    return {
        "D": problem.head_dim,
        "BLOCK_D": block_d(problem),
        "M": problem.mini_batch,
        "C": sizes.per_chunk * problem.mini_batch,
        "PRECISION": problem.matmul_precision,
    }


# Declared spills, bytes a thread, of sm_80 and sm_100 under Triton 3.7, and a little for others; sm_90 has none.
_SPILLS = {
    ("split_recurrence", 16): 512,
    ("split_read_out_backward", 16): 512,
    ("split_reverse_recurrence", 16): 128,
    ("split_update_backward", 16): 640,
    ("split_recurrence_wide", 64): 256,
    ("split_read_out", 64): 320,
    ("split_read_out_backward", 64): 1024,
    ("split_reverse_recurrence_wide", 64): 640,
    ("split_update_backward", 64): 512,
}


def static_kernels() -> Iterator[TritonKernel]:
    """All kernels at the sizes of the named cases."""
    return once(_kernels())


def _kernels() -> Iterator[TritonKernel]:
    for mini_batch, causal in ((16, True), (64, True), (64, False)):
        problem = Problem("linear", 1, 256, 32, 64, mini_batch, causal, dtype="bf16")
        outputs, residuals, steps = plan_forward(meta(LinearInputs, problem), problem, default_group(problem))
        for step in steps + plan_backward(outputs, residuals, problem)[1]:
            spills = _SPILLS.get((step.launch.kernel.__name__, mini_batch), 0)
            yield step.launch.static("linear", spills)
