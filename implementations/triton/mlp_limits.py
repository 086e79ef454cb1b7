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
    if not _fits(problem):
        size = f"{problem.mini_batch} with head_dim {problem.head_dim} in {problem.matmul_precision} {problem.dtype}"
        return f"mini_batch: {size} needs more shared memory than an H100 has: use a smaller one, or cuda.cupy"
    return None


def _fits(problem: Problem) -> bool:
    """Whether the 227 KB of an H100's SM hold the backward's operands, as compiled."""
    wide = problem.head_dim > 64  # blocks are powers of two
    if problem.dtype == "fp32" and problem.matmul_precision == "ieee":
        return problem.mini_batch <= (32 if wide else 64)
    return problem.mini_batch <= 64 or not wide


def newer_ptxas(problem: Problem) -> bool:
    """Whether the kernels have to be assembled by the newer of the two ptxas that Triton brings.

    ptxas 12.8, which Triton 3.6 and 3.7 take for sm_90, makes wrong code of some kernels with many operands of
    warp-group products in shared memory: it takes their addresses from registers that it never wrote. So lm-1.3b-m64
    ended in illegal accesses on an H100; the same code assembled by ptxas 12.9 is right there. Seen only with blocks
    narrower than 64, which M = D = 64 in bf16 and fp16 does not have.
    """
    wide = problem.mini_batch == problem.head_dim == 64 and problem.dtype in ("bf16", "fp16")
    return problem.mini_batch > 16 and not wide


def offchain_limit(problem: Problem) -> str | None:
    """Why `triton.offchain` cannot solve `problem`, with the way out, or None."""
    if problem.dtype not in ("bf16", "fp16"):
        return f"dtype: expected bf16 or fp16, got {problem.dtype}: use triton.chain"
    if problem.head_dim not in (32, 64, 96):
        return f"head_dim: expected 32, 64 or 96, got {problem.head_dim}: use triton.chain"
    sizes = (16,) if problem.head_dim == 96 else (16, 64)
    if problem.mini_batch not in sizes:
        expected = " or ".join(map(str, sizes))
        return f"mini_batch: expected {expected}, got {problem.mini_batch}: use triton.chain"
    return None
