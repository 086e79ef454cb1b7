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

    On an H100 with Triton 3.6, parity of lm-1.3b-m64 ended in an illegal access that neither the interpreter nor a
    small case under compute-sanitizer shows; until it is found, no larger mini-batch than what was right there.
    """
    if problem.mini_batch > 16:
        return f"mini_batch: above 16 it faults on an H100, got {problem.mini_batch}: use cuda.cupy or torch.eager"
    return None


def offchain_limit(problem: Problem) -> str | None:
    """Why `triton.offchain` cannot solve `problem`, with the way out, or None."""
    if problem.dtype not in ("bf16", "fp16"):
        return f"dtype: expected bf16 or fp16, got {problem.dtype}: use triton.chain"
    if problem.head_dim not in (16, 32, 64):  # two of D x 4 D in fp32 are half of an SM's registers at 64
        expected = "16, 32 or 64, whose fast weights fit in registers"
        return f"head_dim: expected {expected}, got {problem.head_dim}: use triton.chain"
    if problem.mini_batch not in (16, 64):
        return f"mini_batch: expected 16 or 64, the sizes verified on a GPU, got {problem.mini_batch}: use triton.chain"
    return None
