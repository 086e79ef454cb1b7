"""What the Triton TTT-MLP can solve; imports neither PyTorch nor Triton, so that the registry can ask."""

from __future__ import annotations

from spec.problem import Problem


def supports(problem: Problem) -> str | None:
    """Why the kernels cannot solve `problem`, or None."""
    if problem.dtype == "fp64":
        return "dtype: expected fp32, bf16 or fp16, got fp64"
    if problem.head_dim % 16 or problem.head_dim > 128:
        return f"head_dim: expected a multiple of 16 up to 128, got {problem.head_dim}"
    if problem.mini_batch > 128:
        return f"mini_batch: expected at most 128, got {problem.mini_batch}"
    return None
