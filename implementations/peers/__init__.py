"""Public TTT code on this lab's bench: each page maps a peer's own dialect onto this spec, exactly where the two meet.

A page repairs nothing: what the peer computes is what is judged. Where the dialects part, `supports` says why. The
kernels come with `pip install ".[peers]"`; the official formulations need only their framework. No grid runs peers
unless it names them or is one for a GPU.
"""

import shutil

from implementations.registry import Implementation
from spec.problem import Problem

_INNER_MODELS = ("linear", "mlp")
_FLA = "flash-linear-attention"
_TK = "test-time-training"


def _official(problem: Problem) -> str | None:
    return None if problem.causal else "the official formulations are causal"


def _official_compiled(problem: Problem) -> str | None:
    if reason := _official(problem):
        return reason
    return None if shutil.which("c++") or shutil.which("g++") else "torch.compile needs a C++ compiler (g++)"


def _fla(problem: Problem) -> str | None:
    if not problem.causal:
        return f"{_FLA} is causal"
    if problem.head_dim > 128:
        return f"{_FLA} has no head_dim above 128"
    if problem.mini_batch < 16 or problem.mini_batch & (problem.mini_batch - 1):
        return f"{_FLA} has chunks of 16 or a larger power of two"
    if not getattr(problem, "one_lr", False):
        return f"{_FLA} has a learning rate of the reading token: it meets this spec where a mini-batch has one lr"
    return None


def _tk(problem: Problem) -> str | None:
    if problem.causal:
        return f"{_TK} is not causal"
    if (problem.head_dim, problem.mini_batch) != (64, 64):
        return f"{_TK} has head_dim 64 and mini_batch 64 only"
    return None if problem.eps == 1e-6 else f"{_TK} has eps 1e-6 only"


def _fla_entry(key: str) -> Implementation:
    return Implementation(
        f"peer.{key}",
        "torch",
        {"linear": f"implementations.peers.{key}"},
        dtypes=("fp32", "bf16", "fp16"),
        devices=("cuda",),
        supports=_fla,
        tested={"fla-core": "0.6.0"},
    )


ENTRIES = (
    _fla_entry("fla_chunk"),
    _fla_entry("fla_fused_chunk"),
    Implementation(
        "peer.ttt_tk",
        "torch",
        {"mlp": "implementations.peers.ttt_tk"},
        dtypes=("bf16",),
        devices=("cuda",),
        supports=_tk,
        tested={"test-time-training": "0.9.0"},
    ),
    Implementation(
        "peer.ttt_lm_jax",
        "jax",
        dict.fromkeys(_INNER_MODELS, "implementations.peers.ttt_lm_jax"),
        supports=_official,
    ),
    Implementation(
        "peer.ttt_lm_torch",
        "torch",
        dict.fromkeys(_INNER_MODELS, "implementations.peers.ttt_lm_torch"),
        supports=_official,
    ),
    Implementation(
        "peer.ttt_lm_torch_compile",
        "torch",
        dict.fromkeys(_INNER_MODELS, "implementations.peers.ttt_lm_torch_compile"),
        supports=_official_compiled,
    ),
)
