"""TTT-MLP in Triton with nothing on the chain but the recurrence; read `triton.chain` (`ttt_mlp.py`) first.

What it changes: one program walks only `w -> z1 -> gelu -> z2 -> LayerNorm gradient -> g_z1 -> w'` of a chain, with
both weight matrices in fp32 registers, or in the L2 cache where they do not fit (M = 64, D = 96: `mlp_tiles.py`), and
leaves z1, g_x2 and g_z2 behind. The read-out is parallel over chunks of 64
tokens, which read the weights at the start of their chunk and attend to the updates since (`mlp_readout.py`). The
backward does the same: recurrence again, read-out backward in parallel, a reverse scan over d_w alone
(`mlp_scan.py`), and the rest in parallel. Segments of G mini-batches bound the memory that this takes.

    forward   for each segment:           recurrence -> read_out
    backward  for each segment, reversed: recurrence -> read_out_backward -> scan -> finish

Memory. The forward saves, a token and head, the read-out's LayerNorm, 4 D + 4 bytes, and the fast weights at the start
of every segment but the first, 4 (8 D^2 + 5 D) / (G M): at D = 64, 260 and, for segments of 1024 tokens, 129, beside
386 for the inputs in bf16. `WORKSPACE` is the budget for what the backward's kernels hand to each other,
`workspace_bytes` a token and head: `default_group` cuts the sequence to fit.

What bounds it is the latency of the steps, not bytes: a step of the scan with rows of 32 bytes, 128 apart, took 30 us,
21 since what it reads of a mini-batch lies together, and 16 since lanes read and write what they compute with
(`mlp_lanes.py`). In bf16 on an H100, each kernel alone, forward / forward and backward: lm-1.3b 1.04 / 5.8 ms
(recurrence 0.71, read-out 0.33; recurrence 0.88, read-out 1.30, scan 2.06, the rest 0.57); video-5b 6.1 / 27.7 (5.0,
1.1; 5.2, 3.9, 10.9, 1.7); lm-760m 3.3 / 15.5 (3.0, 0.3; 3.3, 1.7, 6.6, 0.6). Whole calls of `ttt_mlp` take 2.6 / 21,
10.5 / 74 and 8.0 / 44.

No atomics: sums over chunks are partial sums, added up in torch in one order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from implementations.kernels import TritonKernel, once
from implementations.triton.arguments import Shared, check, empty, tokens, view
from implementations.triton.launch import Launch, assembled, meta
from implementations.triton.mlp_limits import newer_ptxas, offchain_limit
from implementations.triton.mlp_readout import Norm, Pulled, Sums, read_out, read_out_backward
from implementations.triton.mlp_scan import Walked, finish, scan
from implementations.triton.mlp_tiles import Held, recurrence_tiled, scan_tiled
from implementations.triton.mlp_trace import Trace, Weights, recurrence
from spec.problem import Problem
from spec.tensors import INPUTS, OUTPUTS, MlpInputs, MlpOutputs

WORKSPACE = 2**30  # bytes that the backward may take for a segment beside its results
CHUNK = 64  # tokens that the parallel kernels take at once, where the mini-batches divide it


class Residuals(NamedTuple):
    """What the backward needs: the inputs, and the fast weights at the start of every segment but the first."""

    inputs: MlpInputs
    saved_w1: Tensor  # [B H S-1 D F] for S segments
    saved_b1: Tensor  # [B H S-1 F]
    saved_w2: Tensor  # [B H S-1 F D]
    saved_b2: Tensor  # [B H S-1 D]
    x_hat: Tensor  # [B H chunks C D], the LayerNorm of the read-out
    rstd: Tensor  # [B H chunks C]
    group: int


def forward(inputs: MlpInputs, problem: Problem, group: int | None = None) -> tuple[MlpOutputs, Residuals]:
    """Outputs of TTT-MLP, and what `backward` needs; `group` is G, the mini-batches of a segment.

    Raises:
        ValueError: `problem` is beyond `offchain_limit`, a tensor does not fit it or the kernels, or `group` is not a
            multiple of the mini-batches in a chunk.
    """
    _check(inputs, INPUTS, problem)
    group = default_group(problem) if group is None else group
    ratio = chunk(problem) // problem.mini_batch
    if group < 1 or group % ratio:
        raise ValueError(f"group: expected a positive multiple of {ratio} mini-batches, got {group}")
    outputs, residuals, launches = plan_forward(inputs, problem, group)
    _run(launches, problem, inputs.xq.device)
    return outputs, residuals


def backward(cotangents: MlpOutputs, residuals: Residuals, problem: Problem) -> MlpInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent does not fit `problem` or the kernels.
    """
    _check(cotangents, OUTPUTS, problem, residuals.inputs.xq.device)
    gradients, read, update, launches = plan_backward(cotangents, residuals, problem)
    _run(launches, problem, cotangents.out.device)
    # Over chunks and chains, always in the same order.
    in_mini_batch = read.d_token_eta.reshape(-1, problem.mini_batch).sum(0)
    d_token_eta = in_mini_batch if problem.causal else torch.zeros_like(in_mini_batch)
    d_token_eta[-1] += read.d_eta_last.sum() + update.d_eta_last.sum()
    if not problem.causal:
        d_token_eta[-1] += in_mini_batch.sum()
    d_ln = [(read[i] + update[i]).sum((0, 2)) for i in (2, 3)]
    return gradients._replace(token_eta=d_token_eta, ln_weight=d_ln[0], ln_bias=d_ln[1])


def plan_forward(inputs: MlpInputs, problem: Problem, group: int) -> tuple[MlpOutputs, Residuals, list[Launch]]:
    """What `forward` gives, and the launches that fill it."""
    like = inputs.xq
    outputs = MlpOutputs(*(empty(like, *x.shape, dtype=x.dtype) for x in (like, *inputs[7:])))
    segments = _segments(problem, group)
    residuals = Residuals(inputs, *(empty(like, *shape) for shape in _saved_shapes(problem, group)), group)
    norm = Norm(residuals.x_hat, residuals.rstd)
    trace = _trace(like, problem, segments[0][1], backward=False)
    launches = []
    for number, (first, count) in enumerate(segments):
        end = _state(residuals, number + 1) if number + 1 < len(segments) else (Weights(*outputs[1:]), 1)
        launches.append(_recurrence(residuals, problem, trace, number, end, backward=False))
        arguments = _given(inputs) | {"trace": trace, "out": view(outputs.out), "norm": norm}
        arguments |= _chunks(problem, first, count)
        launches.append(_launch(read_out, problem, count, arguments))
    return outputs, residuals, launches


def plan_backward(
    cotangents: MlpOutputs, residuals: Residuals, problem: Problem
) -> tuple[MlpInputs, Sums, Sums, list[Launch]]:
    """Gradients without those of the shared parameters, two parts of these, and the launches that fill them."""
    inputs = residuals.inputs
    like, h, d, f, c = inputs.xq, problem.heads, problem.head_dim, problem.hidden, chunk(problem)
    segments = _segments(problem, residuals.group)
    chunks = problem.tokens // c

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return empty(like, problem.batch, h, segments[0][1] * problem.mini_batch // c, *shape, dtype=dtype)

    io = like.dtype
    trace = _trace(like, problem, segments[0][1], backward=True)
    pulled = Pulled(
        scratch(f, c, dtype=io), scratch(f, c, dtype=io), scratch(d, c),
        scratch(f, d, dtype=io), scratch(f), scratch(f, d, dtype=io), scratch(d), scratch(c, d), scratch(c),
        scratch(f, c, dtype=io), scratch(f, c, dtype=io), scratch(f, c, dtype=io),
        scratch(d, c), scratch(c), scratch(c), scratch(c), scratch(c),
    )  # fmt: skip
    walked = Walked(scratch(f, c, dtype=io), scratch(d, c), scratch(d, c), scratch(f, d, dtype=io), scratch(f))
    read, update = (Sums(*(empty(like, problem.batch, h, chunks, size) for size in (c, c, d, d))) for _ in range(2))
    gradients = MlpInputs(*(empty(like, *x.shape, dtype=x.dtype) for x in inputs))
    d_state = Weights(*gradients[7:])
    known = Weights(*(torch.empty_like(x) for x in d_state)), 1  # where a segment ends: the recurrence says it again
    launches = []
    for number, (first, count) in reversed(list(enumerate(segments))):
        launches.append(_recurrence(residuals, problem, trace, number, known, backward=True))
        at = _chunks(problem, first, count)
        given = _given(inputs) | {"trace": trace, "pulled": pulled}
        read_from = {"norm": Norm(residuals.x_hat, residuals.rstd), "d_out": view(cotangents.out)}
        arguments = given | read_from | {"d_xq": view(gradients.xq), "sums": read} | at
        launches.append(_launch(read_out_backward, problem, count, arguments))
        start = Weights(*cotangents[1:]) if number + 1 == len(segments) else d_state
        arguments = given | {"start": start, "end": d_state, "walked": walked}
        arguments |= {"first": first, "count": count, "heads": h} | _held(like, problem)
        launches.append(_launch(scan_tiled if _in_tiles(problem) else scan, problem, count, arguments))
        arguments = given | {"walked": walked, "gradients": tokens(*gradients[:4]), "sums": update} | at
        launches.append(_launch(finish, problem, count, arguments))
    return gradients, read, update, launches


def saved_shapes(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Of what `forward` saves beside the inputs."""
    return _saved_shapes(problem, default_group(problem))


def residuals(inputs: MlpInputs, saved: list[Tensor], problem: Problem) -> Residuals:
    """What `forward` saved, as `backward` takes it."""
    return Residuals(inputs, *saved, default_group(problem))


def static_kernels() -> Iterator[TritonKernel]:
    """Every kernel at the sizes of the named cases."""
    return once(_kernels())


def _kernels() -> Iterator[TritonKernel]:
    for head_dim, mini_batch, causal in ((64, 16, True), (96, 16, True), (64, 64, True), (64, 64, False)):
        problem = Problem("mlp", 1, 256, 32, head_dim, mini_batch, causal, dtype="bf16")
        outputs, residuals, launches = plan_forward(meta(MlpInputs, problem), problem, 16)
        for launch in (*launches, *plan_backward(outputs, residuals, problem)[-1]):
            yield launch.static("mlp", _SPILLS[launch.kernel])


# --- Sizes and settings ---


class Setting(NamedTuple):
    """How a kernel is launched: hidden units of a block, where it walks blocks, and Triton's options."""

    block: int
    num_warps: int
    num_stages: int = 1
    maxnreg: int | None = None


# Measured on an H100 in bf16 at D = 64.
_SETTINGS: dict[str, Setting] = {
    "recurrence": Setting(0, 8),
    "recurrence_tiled": Setting(0, 8, 1, 255),
    "scan": Setting(0, 8, 1, 255),
    "scan_tiled": Setting(0, 8, 1, 255),
    "read_out": Setting(32, 4, 3),
    "read_out_backward": Setting(32, 4, 2),
    "finish": Setting(64, 4, 2),
}
# Bytes a thread that spill, as compiled by Triton 3.7, on the worst of sm_80, sm_90 and sm_100. Fast weights in
# registers take half of those of an SM, and the products between need the other half and more; so do the blocks of
# M = 64, and D padded to 128. sm_80 is mostly the worst, without warp-group products.
_SPILLS = {
    recurrence: 650, recurrence_tiled: 1600, read_out: 32, read_out_backward: 2600, scan: 1200, scan_tiled: 2300,
    finish: 1800,
}  # fmt: skip


def _in_tiles(problem: Problem) -> bool:
    """Whether the fast weights, and what a step makes of a mini-batch, are too many for the registers of an SM."""
    return problem.head_dim > 64 or problem.mini_batch > 16


def chunk(problem: Problem) -> int:
    """C: the mini-batches of up to CHUNK tokens together that divide the sequence, or one that is larger."""
    size = problem.mini_batch
    while 2 * size <= CHUNK and problem.tokens % (2 * size) == 0:
        size *= 2
    return size


def workspace_bytes(problem: Problem) -> float:
    """What the backward's kernels hand to each other, a token of a head."""
    d, f, c, m = problem.head_dim, problem.hidden, chunk(problem), problem.mini_batch
    size = 4 if problem.dtype == "fp32" else 2
    of_token = size * (8 * f + d) + 4 * (6 * d + 6)
    of_chunk = size * 4 * f * d + 4 * (3 * f + 2 * d)
    return of_token + of_chunk / c + size * f * d / m


def default_group(problem: Problem) -> int:
    """As many mini-batches as `WORKSPACE` has room for, in segments of about the same size."""
    ratio, chunks = chunk(problem) // problem.mini_batch, problem.tokens // chunk(problem)
    of_chunk = workspace_bytes(problem) * problem.batch * problem.heads * chunk(problem)
    segments = -(-chunks // max(1, int(WORKSPACE // of_chunk)))
    return -(-chunks // segments) * ratio


def saved_bytes(problem: Problem, group: int) -> float:
    """The bytes of fast weights that the forward saves for a token of a head."""
    d = problem.head_dim
    return 4 * (8 * d * d + 5 * d) * (-(-problem.mini_batches // group) - 1) / problem.tokens


def _saved_shapes(problem: Problem, group: int) -> tuple[tuple[int, ...], ...]:
    d, f, c = problem.head_dim, problem.hidden, chunk(problem)
    between = len(_segments(problem, group)) - 1
    states = [(between, *shape) for shape in ((d, f), (f,), (f, d), (d,))]
    of_chain = (*states, (problem.tokens // c, c, d), (problem.tokens // c, c))
    return tuple((problem.batch, problem.heads, *shape) for shape in of_chain)


def _segments(problem: Problem, group: int) -> list[tuple[int, int]]:
    """(first mini-batch, mini-batches) of every segment; the first is the largest."""
    n = problem.mini_batches
    return [(first, min(group, n - first)) for first in range(0, n, group)]


def _trace(like: Tensor, problem: Problem, count: int, backward: bool) -> Trace:
    b, h, d, f, c = problem.batch, problem.heads, problem.head_dim, problem.hidden, chunk(problem)
    k, io = count * problem.mini_batch // c, like.dtype
    states = count if backward else k
    z2 = (k, d, c) if backward else (1, d, 1)
    return Trace(
        z1=empty(like, b, h, k, f, c, dtype=io),
        g_x2=empty(like, b, h, k, f, c, dtype=io),
        g_z2=empty(like, b, h, k, d, c, dtype=io),
        w1=empty(like, b, h, k, f, d, dtype=io),
        b1=empty(like, b, h, k, f),
        w2=empty(like, b, h, states, f, d, dtype=io),
        b2=empty(like, b, h, k, d),
        x_hat=empty(like, b, h, *z2),
        rstd=empty(like, b, h, z2[0], z2[2]),
    )


def _state(residuals: Residuals, number: int) -> tuple[Weights, int]:
    """The saved state that segment `number` starts with, and how many of them a chain has."""
    return Weights(*(x[:, :, number - 1] for x in residuals[1:5])), residuals.saved_w1.shape[2]


def _given(inputs: MlpInputs) -> dict[str, object]:
    return {"inputs": tokens(*inputs[:4]), "shared": Shared(*inputs[4:7])}


def _held(like: Tensor, problem: Problem) -> dict[str, Held]:
    """Where a walk in tiles has what it walks with; other walks have that in registers."""
    if not _in_tiles(problem):
        return {}
    shape = problem.batch, problem.heads, problem.hidden
    w1, w2 = (empty(like, *shape, problem.head_dim) for _ in range(2))
    return {"held": Held(w1, empty(like, *shape), w2)}


def _chunks(problem: Problem, first: int, count: int) -> dict[str, int]:
    ratio = chunk(problem) // problem.mini_batch
    return {
        "first": first // ratio, "chunks": count // ratio, "all_chunks": problem.mini_batches // ratio,
        "heads": problem.heads,
    }  # fmt: skip


def _recurrence(
    residuals: Residuals, problem: Problem, trace: Trace, number: int, end: tuple[Weights, int], backward: bool
) -> Launch:
    inputs = residuals.inputs
    first, count = _segments(problem, residuals.group)[number]
    start = _state(residuals, number) if number else (Weights(*inputs[7:]), 1)
    arguments = _given(inputs) | {
        "start": start[0], "end": end[0], "trace": trace, "start_states": start[1], "end_states": end[1],
        "first": first, "count": count, "heads": problem.heads,
    }  # fmt: skip
    arguments |= _held(inputs.xq, problem)
    launch = _launch(recurrence_tiled if _in_tiles(problem) else recurrence, problem, count, arguments)
    return launch._replace(constants={**launch.constants, "BACKWARD": backward})


def _launch(kernel, problem: Problem, count: int, arguments: dict[str, object]) -> Launch:
    name = kernel.fn.__name__
    how = _SETTINGS[name]
    if name == "read_out_backward" and problem.head_dim > 64:  # 1.74 ms on lm-760m, where four warps took 2.25
        how = how._replace(num_warps=8)
    c = chunk(problem)
    sizes = {"D": problem.head_dim, "M": problem.mini_batch, "C": c, "CAUSAL": problem.causal, "EPS": problem.eps}
    options = {"num_warps": how.num_warps} | ({"maxnreg": how.maxnreg} if how.maxnreg else {})
    programs = problem.batch * problem.heads
    if name.startswith(("recurrence", "scan")):
        options["num_stages"] = how.num_stages
        sizes["W"] = options["num_warps"] = min(how.num_warps, problem.hidden // 16)
    else:
        sizes |= {"BF": min(how.block, problem.hidden), "STAGES": how.num_stages}
        sizes["BD"] = 1 << (problem.head_dim - 1).bit_length()
    if name in ("read_out", "read_out_backward", "finish"):
        programs *= count * problem.mini_batch // c
    constants = {key: value for key, value in sizes.items() if key in kernel.arg_names}
    return Launch(kernel, programs, arguments, constants, options)


def _run(launches: list[Launch], problem: Problem, device: torch.device) -> None:
    with assembled(device.type == "cuda" and newer_ptxas(problem)):
        for launch in launches:
            launch.run(device)


def _check(tensors, kinds, problem: Problem, device: torch.device | None = None) -> None:
    """As `check`, and that these kernels solve `problem`."""
    if reason := offchain_limit(problem):
        raise ValueError(reason)
    check(tensors, kinds, problem, device)
