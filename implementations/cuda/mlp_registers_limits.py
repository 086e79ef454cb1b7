"""What `cupy_mlp_registers` can solve; imports no framework, so that the registry may ask."""

from __future__ import annotations

from spec.problem import Dtype, Problem

DTYPES: tuple[Dtype, ...] = ("bf16", "fp16")
HEAD_DIMS, MINI_BATCHES = (16, 32, 64, 96), (16, 32, 64)
WIDE = 96  # only a cluster of two blocks has registers for its state, and they are enough for one chunk of tokens


def splits(problem: Problem) -> tuple[int, ...]:
    """How many blocks may have a chain."""
    return (2,) if problem.head_dim == WIDE else (1, 2)


def limit(problem: Problem) -> str | None:
    """Why it cannot solve `problem`, with the way out; None if it can."""
    if problem.dtype not in DTYPES:
        return f"dtype: expected one of {', '.join(DTYPES)} for tensor cores, got {problem.dtype}: use cuda.cupy_plain"
    if problem.head_dim not in HEAD_DIMS:
        return f"head_dim: expected 16, 32, 64 or 96 for registers, got {problem.head_dim}: use cuda.cupy_plain"
    if problem.mini_batch not in MINI_BATCHES:
        return f"mini_batch: expected 16, 32 or 64, got {problem.mini_batch}: use cuda.cupy_plain"
    if problem.head_dim == WIDE and problem.mini_batch > 16:
        return f"mini_batch: expected 16 with head_dim {WIDE}, got {problem.mini_batch}: use cuda.cupy_plain"
    if problem.dtype == "fp16" and not problem.causal:
        return "dtype: in fp16 the steps are subnormal, and d_token_eta is not exact enough: use cuda.cupy_plain"
    return None
