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


def gpu_limit(problem: Problem) -> str | None:
    """Why `triton.chain` is not launched on a GPU for `problem`, or None.

    ptxas 12.8, which Triton 3.6 and 3.7 bring, makes wrong code of some kernels with many operands of warp-group
    products in shared memory: it takes their addresses from registers that it never wrote. Its 12.9 does not. Seen
    with blocks narrower than 64; the sizes here were run under compute-sanitizer, and their machine code was searched.
    """
    if problem.mini_batch > 16 and (problem.mini_batch != 64 or problem.head_dim != 64):
        size = f"{problem.mini_batch} with head_dim {problem.head_dim}"
        return f"mini_batch: expected up to 16, or 64 with head_dim 64, got {size}: use cuda.cupy or torch.eager"
    return None


def offchain_limit(problem: Problem) -> str | None:
    """Why `triton.offchain` cannot solve `problem`, with the way out, or None."""
    if problem.dtype not in ("bf16", "fp16"):
        return f"dtype: expected bf16 or fp16, got {problem.dtype}: use triton.chain"
    if problem.head_dim not in (16, 32, 64):  # two of D x 4 D in fp32 are half of an SM's registers at 64
        expected = "16, 32 or 64, whose fast weights fit in registers"
        return f"head_dim: expected {expected}, got {problem.head_dim}: use triton.chain"
    if problem.mini_batch not in (16, 64):  # see `gpu_limit`
        return f"mini_batch: expected 16 or 64, the sizes verified on a GPU, got {problem.mini_batch}: use triton.chain"
    return None
