"""TTT-MLP in CUDA C++ on tensor cores: a block, or a cluster of two, a chain, with its state in registers.

Forward (`kernels/mlp_forward.cu`, not causal `mlp_forward_not_causal.cu`, for mini-batches of 16 tokens
`mlp_forward_short.cu`): the fast weights, fp32, are the accumulators of their own updates by `mma.sync`; rounded as
they lie they are operands of the products with xk and xq, so they never leave the registers. Backward
(`kernels/mlp_backward.cu`): the same with the cotangents of the fast weights, after the fast weights of a group of
mini-batches have been computed again from saved ones.

The forward keeps for the backward, a token and head, 4 D + 8 bytes of LayerNorms and (32 D^2 + 16 D) / (group M) of
states: 792 bytes at D = 64, M = 16, group = 16. The backward works in `work_bytes` of global memory a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from implementations.cuda.arguments import KERNEL_DTYPE, View, check, contiguous_like, default_split, view
from implementations.cuda.mlp_registers_limits import WIDE, limit, splits
from implementations.cuda.module import launch
from implementations.kernels import ARCHITECTURES, CudaKernel, architectures_with
from spec.problem import Dtype, Problem
from spec.tensors import INPUTS, OUTPUTS, MlpInputs, MlpOutputs

KERNELS = Path(__file__).with_name("kernels")
GROUP = 16  # mini-batches between two saved states


class ForwardArguments(NamedTuple):
    """As in `mlp_forward.cu`."""

    xq: View
    xk: View
    xv: View
    lr: View
    token_eta: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    out: Tensor
    final_w1: Tensor
    final_b1: Tensor
    final_w2: Tensor
    final_b2: Tensor
    saved: Tensor
    x_hat: Tensor
    x_hat_bar: Tensor
    rstd: Tensor
    rstd_bar: Tensor
    heads: int
    mini_batches: int
    group: int
    aligned: int
    eps: float


class BackwardArguments(NamedTuple):
    """As in `mlp_backward.cu`."""

    xq: View
    xk: View
    xv: View
    lr: View
    token_eta: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    d_out: View
    d_final_w1: Tensor
    d_final_b1: Tensor
    d_final_w2: Tensor
    d_final_b2: Tensor
    saved: Tensor
    x_hat: Tensor
    x_hat_bar: Tensor
    rstd: Tensor
    rstd_bar: Tensor
    d_xq: Tensor
    d_xk: Tensor
    d_xv: Tensor
    d_lr: Tensor
    d_w1: Tensor
    d_b1: Tensor
    d_w2: Tensor
    d_b2: Tensor
    d_token_eta: Tensor
    d_ln_weight: Tensor
    d_ln_bias: Tensor
    work: Tensor
    work_size: int
    heads: int
    mini_batches: int
    group: int
    aligned: int
    eps: float


class Residuals(NamedTuple):
    """The inputs; the fast weights of every `group`-th mini-batch; both LayerNorms; how both passes are cut."""

    inputs: MlpInputs
    saved: Tensor
    x_hat: Tensor
    x_hat_bar: Tensor
    rstd: Tensor
    rstd_bar: Tensor
    group: int
    split: int


def forward(
    inputs: MlpInputs, problem: Problem, group: int = GROUP, split: int | None = None
) -> tuple[MlpOutputs, Residuals]:
    """Outputs of TTT-MLP, and what `backward` needs; `split` blocks work on a chain, 1 or 2, of D = 96 always 2.

    Raises:
        ValueError: a tensor has another shape, dtype, device or layout than the kernel takes.
    """
    check(inputs, INPUTS, problem, limit(problem))
    residuals = empty_residuals(inputs, problem, group, split)
    outputs = MlpOutputs(contiguous_like(inputs.xq), *map(contiguous_like, inputs[7:]))
    arguments = ForwardArguments(
        *map(view, inputs[:4]), *inputs[4:], *outputs, *residuals[1:6],
        problem.heads, problem.mini_batches, group, int(all(map(aligned, inputs[:3]))), problem.eps,
    )  # fmt: skip
    kernel, blocks = forward_kernel(problem, residuals.split), problem.batch * problem.heads * residuals.split
    launch(kernel, blocks, arguments, inputs.xq.device, problem)
    return outputs, residuals


def empty_residuals(inputs: MlpInputs, problem: Problem, group: int = GROUP, split: int | None = None) -> Residuals:
    """Residuals with room for what the forward leaves and nothing in it yet.

    Raises:
        ValueError: `group` or `split` is not a number that the kernels know.
    """
    allowed = splits(problem)
    if group < 1 or split not in (None, *allowed):
        raise ValueError(f"group, split: expected at least 1, and one of {allowed}, got {group}, {split}")
    chains, like = problem.batch * problem.heads, inputs.w1
    saved = like.new_empty(chains, -(-problem.mini_batches // group), 8 * problem.head_dim**2 + problem.hidden)
    norms = [like.new_empty(chains, problem.tokens, problem.head_dim, dtype=torch.float16) for _ in range(2)]
    norms += [like.new_empty(chains, problem.tokens) for _ in range(2)]
    return Residuals(inputs, saved, *norms, group, split or max(allowed[0], default_split(problem, like.device)))


def backward(cotangents: MlpOutputs, residuals: Residuals, problem: Problem) -> MlpInputs:
    """Gradients of every input, from the cotangents of the output and of the final state.

    Raises:
        ValueError: a cotangent has another shape, dtype, device or layout than the kernel takes.
    """
    inputs, *kept, group, split = residuals
    check(cotangents, OUTPUTS, problem, limit(problem), inputs.xq)
    b, h, d, m = problem.batch, problem.heads, problem.head_dim, problem.mini_batch
    like, size = inputs.w1, work_bytes(problem, group, split)
    d_tokens, d_state = list(map(contiguous_like, inputs[:4])), list(map(contiguous_like, inputs[7:]))
    d_token_eta, d_ln_weight, d_ln_bias = (
        like.new_empty(shape) for shape in ((b * h * split, m), (b, h, d), (b, h, d))
    )
    work = like.new_empty(b * h * split, size, dtype=torch.uint8)
    arguments = BackwardArguments(
        *map(view, inputs[:4]), *inputs[4:7], view(cotangents.out), *cotangents[1:], *kept,
        *d_tokens, *d_state, d_token_eta, d_ln_weight, d_ln_bias, work, size,
        h, problem.mini_batches, group, int(all(map(aligned, (*inputs[:3], cotangents.out)))), problem.eps,
    )  # fmt: skip
    launch(backward_kernel(problem, split), b * h * split, arguments, like.device, problem)
    return MlpInputs(*d_tokens, d_token_eta.sum(0), d_ln_weight.sum(0), d_ln_bias.sum(0), *d_state)


def aligned(x: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])


def work_bytes(problem: Problem, group: int, split: int) -> int:
    """Global memory of a block in the backward: `Work` in `mlp_backward.cu`, and `group + 1` rounded states."""
    d, m = problem.head_dim, problem.mini_batch
    chunks, warps = m // 16, d // 8
    fixed = 32 * d * d // split + 4 * m * d
    fixed += 7 * chunks * warps * 1024 // split + chunks * (chunks + 1) // 2 * warps * 512
    return fixed + (group + 1) * (16 * d * d + 16 * d) // split


def kernels(problem: Problem) -> tuple[CudaKernel, CudaKernel]:
    """What both passes launch with the fewest blocks a chain."""
    split = splits(problem)[0]
    return forward_kernel(problem, split), backward_kernel(problem, split)


def forward_kernel(problem: Problem, split: int = 1) -> CudaKernel:
    """The instance that solves `problem`."""
    d, m = problem.head_dim, problem.mini_batch
    row, chunks, warps = d + 8, m // 16, d // 8
    if chunks == 1:  # `ShortShared` in `mlp_forward_short.cu`
        shared = 11 * m * row * 2 + 2 * warps * 16 * row * 4 + (3 * 4 * d * 16 if split == 2 else 16)
        shared += 1024 * ((d // 16 if problem.causal else 1) + 1) + 512
        shared += 4 * (4 * m + 4 * d // split + _place_warps(d) * d) + 2 * 8
        return _kernel(problem, "mlp_forward_short", shared, split)
    if not problem.causal:  # `NotCausalShared` in `mlp_forward_not_causal.cu`
        wide = problem.hidden // split + 8
        shared = 16 * m * row + 4 * m * wide + 2 * d * wide + chunks * warps * 1024 // split
        shared += 1024 if split == 1 else 128 * d * (chunks + chunks // 2)
        shared += 8 * d + 4 * (2 * m + problem.hidden // split + d + chunks * d) + 4 * chunks * 8
        return _kernel(problem, "mlp_forward_not_causal", shared, split)
    squares = chunks * (chunks + 1) // 2
    sums = 1 if split == 2 and chunks == 4 else 2
    exchanged = chunks + (chunks + 1) // 2
    shared = (  # `ForwardShared` in `mlp_forward.cu`
        8 * m * row * 2
        + sums * warps * 16 * row * 4
        + (3 * exchanged * 4 * d * 16 if split == 2 else 3 * 16)
        + 2 * chunks * warps * 1024 // split
        + (squares + 1) * 512
        + 4 * (3 * m + 4 * d // split + warps * d)
        + 4 * 8
    )
    return _kernel(problem, "mlp_forward", shared, split)


def backward_kernel(problem: Problem, split: int = 1) -> CudaKernel:
    """The instance that solves `problem`."""
    d, m, causal = problem.head_dim, problem.mini_batch, problem.causal
    row, chunks, warps = d + 8, m // 16, d // 8
    stages, half = 2 if chunks < 4 else 1, (chunks + 1) // 2
    squares = chunks * (chunks + 1) // 2 if causal else 0
    bend = causal and chunks == 1
    ahead = bend and d <= 64
    turns = 2 if split == 2 and chunks == 1 else 1
    room = {1: 7, 2: 5}.get(chunks, 3 if causal else 4)
    shared = (  # `BackwardShared` in `mlp_backward.cu`
        14 * 8
        + 2 * 4 * d
        + 2 * 4 * d * 16
        + (2 * stages + 3) * m * row * 2
        + (10 * m * row * 2 + warps * 128 * d // split if ahead else 64 + 16 * warps)
        + (warps * 1024 // split if bend else 16 * warps)
        + (2 if chunks == 2 else 1) * warps * 16 * row * 4
        + (((turns + 1) * (chunks + half) + half) * 4 * d * 16 + turns * 8 * m if split == 2 else 80)
        + min(7 if causal else 5, room) * chunks * warps * 1024 // split
        + 2 * (squares + 1) * (1024 if chunks < 4 else 512)
        + 4 * (3 * stages * m + m + 8 * d // split + _place_warps(d) * d)
        + 4 * (warps * m + m + 2 * (warps if causal else 1) * m)
        + 8 * (turns + 1)
    )
    return _kernel(problem, "mlp_backward", shared, split)


# Bytes a thread that spill on the worst of the architectures, with one block a chain: half of its registers are state.
# By the kernel, and whether a mini-batch is more than one chunk of 16 tokens. A cluster has half of the state in each,
# and spills with D = 96 alone: 384 threads, 168 registers, 96 of them state.
_SPILLS = {
    ("mlp_forward_short", False): 120,
    ("mlp_forward", True): 304,
    ("mlp_forward_not_causal", True): 368,
    ("mlp_backward", False): 500,
    ("mlp_backward", True): 1200,
}
_SPILLS_WIDE = {"mlp_forward_short": 700, "mlp_backward": 1136}


def _place_warps(d: int) -> int:
    """`Sizes::PLACE_WARPS` in `mlp.cuh`."""
    return d // 8 if d % 3 else d // 12


def _kernel(problem: Problem, name: str, shared: int, split: int) -> CudaKernel:
    d, m, causal = problem.head_dim, problem.mini_batch, str(problem.causal).lower()
    sizes = (d, m) if name in ("mlp_forward", "mlp_forward_not_causal") else (d, m, causal)
    shared = -(-shared // 16) * 16
    spills = _SPILLS_WIDE[name] if d == WIDE else _SPILLS[name, m > 16] if split == 1 else 0
    return CudaKernel(
        source=KERNELS / f"{name}.cu",
        expression=f"ttt::{name}<{KERNEL_DTYPE[problem.dtype]}, {', '.join(map(str, sizes))}>",
        inner_model="mlp",
        threads=4 * d,
        options=(f"-DTTT_SPLIT={split}",),
        dynamic_shared_bytes=shared,
        declared_spill_bytes=spills,
        cluster=split,
        architectures=architectures_with(shared) if split == 1 else ARCHITECTURES[1:],
    )


def static_kernels() -> Iterator[CudaKernel]:
    """The instances of the named cases in bf16, and one in fp16, where LayerNorms are kept in another form."""
    settings: tuple[tuple[int, int, bool, int, Dtype], ...] = (
        (64, 16, True, 1, "bf16"), (64, 64, True, 1, "bf16"), (64, 64, False, 1, "bf16"), (64, 64, False, 2, "bf16"),
        (96, 16, True, 2, "bf16"), (64, 16, True, 1, "fp16"),
    )  # fmt: skip
    for d, mini_batch, causal, split, dtype in settings:
        problem = Problem("mlp", 1, mini_batch, 1, d, mini_batch, causal, dtype=dtype)
        yield forward_kernel(problem, split)
        yield backward_kernel(problem, split)
