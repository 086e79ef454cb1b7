"""TTT layers in Triton: `ttt_linear` is the page to read first."""

from implementations.registry import Implementation
from implementations.triton.limits import DTYPES, limit

_BOTH = {inner: f"implementations.triton.ttt_{inner}" for inner in ("linear", "mlp")}
_CHAIN = {"linear": "implementations.triton.ttt_linear"}

ENTRIES = (
    Implementation(
        "triton.chain",
        "torch",
        _CHAIN,
        dtypes=DTYPES,
        requires=("triton",),
        supports=limit,
        kernels="implementations.triton.ttt_linear",
        timed_on=("cuda",),
    ),
    Implementation("triton.best", "torch", _BOTH, dtypes=DTYPES, supports=lambda problem: "not written yet"),
)
