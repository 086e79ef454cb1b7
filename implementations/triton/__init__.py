"""TTT layers in Triton: `ttt_linear` is the page to read first."""

from implementations.registry import Implementation
from implementations.triton.limits import DTYPES, limit, split_limit
from implementations.triton.mlp_limits import offchain_limit
from implementations.triton.mlp_limits import supports as mlp_limit
from spec.problem import Problem

_BOTH = {inner: f"implementations.triton.ttt_{inner}" for inner in ("linear", "mlp")}


def _limit(problem: Problem) -> str | None:
    return limit(problem) if problem.inner_model == "linear" else mlp_limit(problem)


ENTRIES = (
    Implementation(
        "triton.chain",
        "torch",
        _BOTH,
        dtypes=DTYPES,
        requires=("triton",),
        supports=_limit,
        kernels="implementations.triton.ttt_linear",
        timed_on=("cuda",),
    ),
    Implementation(
        "triton.split",
        "torch",
        {"linear": "implementations.triton.split_linear"},
        dtypes=DTYPES,
        requires=("triton",),
        supports=split_limit,
        kernels="implementations.triton.split_linear",
        timed_on=("cuda",),
    ),
    Implementation(
        "triton.offchain",
        "torch",
        {"mlp": "implementations.triton.ttt_mlp_offchain"},
        dtypes=("bf16", "fp16"),
        requires=("triton",),
        supports=offchain_limit,
        kernels="implementations.triton.ttt_mlp_offchain",
        timed_on=("cuda",),
    ),
    Implementation(
        "triton.best",
        "torch",
        {"linear": "implementations.triton.best_linear", "mlp": "implementations.triton.best_mlp"},
        dtypes=DTYPES,
        requires=("triton",),
        supports=_limit,
        timed_on=("cuda",),
    ),
)
