"""TTT layers in raw CUDA (numba.cuda and CuPy): registered, so that reports show the rows, and not written yet."""

from implementations.registry import Implementation

_PAGES = {inner: f"implementations.cuda.ttt_{inner}" for inner in ("linear", "mlp")}

ENTRIES = tuple(
    Implementation(key, "torch", _PAGES, dtypes=("fp32", "bf16", "fp16"), supports=lambda problem: "not written yet")
    for key in ("cuda.numba", "cuda.cupy",)
)
