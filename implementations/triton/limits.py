"""What the Triton pages can solve; imports no framework, so that the registry may ask."""

from __future__ import annotations

from spec.problem import Problem

DTYPES = ("fp32", "bf16", "fp16")
MINI_BATCHES = (16, 32, 64, 128)
MAX_HEAD_DIM = 128


def limit(problem: Problem) -> str | None:
    """Why no Triton page solves `problem`, with the way out; None if they do."""
    if problem.dtype not in DTYPES:
        return f"dtype: expected one of {', '.join(DTYPES)}, got {problem.dtype}: use torch.eager"
    if problem.head_dim > MAX_HEAD_DIM:
        return f"head_dim: expected at most {MAX_HEAD_DIM}, got {problem.head_dim}: use torch.eager"
    if problem.mini_batch not in MINI_BATCHES:
        sizes = ", ".join(map(str, MINI_BATCHES))
        return f"mini_batch: expected one of {sizes}, got {problem.mini_batch}: use torch.eager"
    return None
