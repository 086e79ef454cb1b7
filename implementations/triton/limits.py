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
    if problem.inner_model == "linear" and not _linear_fits(problem):
        size = f"{problem.head_dim} with mini_batch {problem.mini_batch} in {problem.matmul_precision} fp32"
        return f"head_dim: {size} needs more shared memory than an H100 has: use a smaller mini_batch, or bf16"
    return None


def split_limit(problem: Problem) -> str | None:
    """Why `split_linear` does not solve `problem`, with the way out."""
    if reason := limit(problem):
        return reason
    if problem.dtype == "fp32" and block_d(problem) * max(problem.mini_batch, 64) > 64 * 64:
        return "head_dim, mini_batch: expected at most 64 in fp32, whose products fill the registers: use triton.chain"
    return None


def block_d(problem: Problem) -> int:
    """D rounded up to what a block may have: a power of 2 that matrix products take."""
    return max(16, 1 << (problem.head_dim - 1).bit_length())


def _linear_fits(problem: Problem) -> bool:
    """Whether the 227 KB of an H100's SM hold the operands, as compiled: tensor cores take those of tf32 from there."""
    if problem.dtype != "fp32" or block_d(problem) * problem.mini_batch <= 64 * 64:
        return True
    return problem.matmul_precision == "ieee" and problem.mini_batch <= (64 if problem.causal else 32)
