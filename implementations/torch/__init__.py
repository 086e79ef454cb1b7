"""TTT layers in PyTorch: `ttt_linear` and `ttt_mlp` are the pages that every other implementation follows."""

import shutil

from implementations.registry import Implementation
from spec.problem import Problem

_PAGES = {inner: f"implementations.torch.ttt_{inner}" for inner in ("linear", "mlp")}


def _needs_compiler(problem: Problem) -> str | None:
    return None if shutil.which("c++") or shutil.which("g++") else "torch.compile needs a C++ compiler (g++)"


ENTRIES = (
    Implementation("torch.eager", "torch", _PAGES),
    Implementation("torch.autograd", "torch", dict.fromkeys(_PAGES, "implementations.torch.autograd")),
    Implementation(
        "torch.compile",
        "torch",
        dict.fromkeys(_PAGES, "implementations.torch.compiled"),
        supports=_needs_compiler,
    ),
)
