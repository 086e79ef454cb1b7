"""What `cupy_linear_split` can solve, by what fits into shared memory; imports no framework: the registry asks.

The kernels count the same in `kernels/linear_plan.cuh` (`Plan`, `Kept`), and do not compile if the numbers differ.
"""

from __future__ import annotations

from typing import NamedTuple

from spec.problem import Dtype, Problem

DTYPES: tuple[Dtype, ...] = ("bf16", "fp16")
SHARED_BYTES = 227 * 1024  # of a block on sm_90 and sm_100


class Ring(NamedTuple):
    """How far the readers of a forward pass may fall behind the recurrence.

    `groups` teams take turns at mini-batches; each has `slots` for weights and `stages` for tokens.
    """

    groups: int
    slots: int
    stages: int


class Rings(NamedTuple):
    """The same of the backward, whose two passes have the same teams; the way back has one slot for each."""

    groups: int
    again_slots: int
    again_stages: int
    reverse_stages: int


# By M: the first that fits is taken. At D = 96 a third team would leave each thread 168 registers, and they spill.
_FORWARD = {
    16: (Ring(4, 1, 3), Ring(3, 1, 3), Ring(2, 2, 5), Ring(2, 1, 3)),
    32: (Ring(2, 2, 5), Ring(2, 1, 3), Ring(1, 1, 3), Ring(1, 1, 2)),
    64: (Ring(1, 2, 5), Ring(1, 2, 4), Ring(1, 1, 3), Ring(1, 1, 2)),
    128: (Ring(1, 1, 3), Ring(1, 1, 2)),
}
_BACKWARD = {
    16: (Rings(4, 1, 3, 2), Rings(3, 1, 3, 2), Rings(2, 1, 3, 2), Rings(1, 1, 3, 2)),
    32: (Rings(2, 1, 3, 2), Rings(1, 1, 3, 3), Rings(1, 1, 3, 2), Rings(1, 1, 2, 2)),
    64: (Rings(1, 2, 4, 3), Rings(1, 2, 4, 2), Rings(1, 1, 3, 3), Rings(1, 1, 3, 2), Rings(1, 1, 2, 2)),
    128: (Rings(1, 1, 2, 2),),
}


def team(problem: Problem) -> int:
    """Readers that share a mini-batch."""
    return min(problem.mini_batch // 16, 4)


def threads(problem: Problem, groups: int) -> int:
    """Of a block: D / 16 warps of the recurrence, and the readers."""
    return 32 * (problem.head_dim // 16 + team(problem) * groups)


def forward_bytes(problem: Problem, ring: Ring) -> int:
    """Shared memory of a block in the forward."""
    d, m = problem.head_dim, problem.mini_batch
    tokens = 2 * m * (d + 8)
    stage = 3 * tokens + 4 * m
    return _fixed_bytes(problem) + ring.groups * (ring.stages * stage + ring.slots * _forward_slot(problem))


def backward_bytes(problem: Problem, rings: Rings) -> int:
    """Shared memory of a block in the backward, whose two passes use the same."""
    d, m = problem.head_dim, problem.mini_batch
    tokens, pairs = 2 * m * (d + 8), 2 * m * (m + 8) if problem.causal else 0
    sums = (rings.groups * team(problem) + 1) * 8 * d + (rings.groups * m + d // 16 + 3) // 4 * 16
    again = rings.again_stages * (4 * tokens + 4 * m) + rings.again_slots * _forward_slot(problem)
    stage = 4 * tokens + 4 * m + 2 * pairs + 4 * m * d + 32 * m
    reverse = rings.reverse_stages * stage + 2 * d * (d + 8) + 3 * tokens
    return _fixed_bytes(problem) + sums + rings.groups * max(again, reverse)


def kept_bytes(problem: Problem) -> int:
    """What the backward's first pass keeps of a mini-batch for its second."""
    d, m = problem.head_dim, problem.mini_batch
    return 2 * d * d + 6 * m * d + 32 * m + (4 * m * m if problem.causal else 0)


def forward_ring(problem: Problem) -> Ring | None:
    """The settings of the forward; None if none fits."""
    m = problem.mini_batch
    most = 256 if problem.head_dim == 96 else 1024
    fits = (forward_bytes(problem, r) <= SHARED_BYTES and threads(problem, r.groups) <= most for r in _FORWARD[m])
    return next((ring for ring, fit in zip(_FORWARD[m], fits, strict=True) if fit), None)


def backward_rings(problem: Problem) -> Rings | None:
    """The settings of the backward; None if none fits."""
    return next((each for each in _BACKWARD[problem.mini_batch] if backward_bytes(problem, each) <= SHARED_BYTES), None)


def limit(problem: Problem) -> str | None:
    """Why `cupy_linear_split` cannot solve `problem`, with the way out; None if it can."""
    if problem.dtype not in DTYPES:
        return f"dtype: expected one of {', '.join(DTYPES)} for tensor cores, got {problem.dtype}: use cuda.cupy_plain"
    if problem.head_dim not in (16, 32, 64, 96, 128):
        return f"head_dim: expected 16, 32, 64, 96 or 128, got {problem.head_dim}: use cuda.cupy_plain"
    if problem.mini_batch not in _FORWARD:
        return f"mini_batch: expected 16, 32, 64 or 128, got {problem.mini_batch}: use cuda.cupy_plain"
    if not forward_ring(problem) or not backward_rings(problem):
        return (
            f"head_dim {problem.head_dim} with mini_batch {problem.mini_batch}: tokens and weights of a mini-batch do "
            f"not fit into {SHARED_BYTES} bytes of shared memory: use cuda.cupy_plain"
        )
    return None


def _fixed_bytes(problem: Problem) -> int:
    """LayerNorm's parameters, token_eta, means of the weights, and the two buffers for sums over the warps."""
    return 12 * problem.head_dim + 20 * problem.mini_batch + 16 + 4 * problem.head_dim * problem.mini_batch


def _forward_slot(problem: Problem) -> int:
    d, m = problem.head_dim, problem.mini_batch
    return 2 * d * (d + 8) + 4 * d + (2 * m * (d + 8) if problem.causal else 0)
