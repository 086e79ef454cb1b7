"""What the plain CUDA pages can solve; imports no framework, so that the registry may ask."""

from __future__ import annotations

from spec.problem import Dtype, Problem

DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "fp16")


def limit(problem: Problem) -> str | None:
    """Why they cannot solve `problem`, with the way out; None if they can."""
    if problem.dtype not in DTYPES:
        return f"dtype: expected one of {', '.join(DTYPES)}, got {problem.dtype}: use torch.eager"
    if problem.matmul_precision == "tf32":
        return "plain fp32 arithmetic: no tensor cores, and so no tf32"
    if problem.head_dim % 16 or problem.head_dim > 128:
        return f"head_dim: expected a multiple of 16 up to 128, got {problem.head_dim}: use torch.eager"
    if problem.mini_batch % 8 or problem.mini_batch > 128:
        return f"mini_batch: expected a multiple of 8 up to 128, got {problem.mini_batch}: use torch.eager"
    return None
