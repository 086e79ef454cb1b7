"""One TTT problem: which inner model, over which sizes, in which precision.

Axes, as everywhere in this repository: `B` batch, `T` tokens, `H` heads, `D` head dimension, `M` mini-batch
size, `N = T / M` mini-batches, `F = 4 D` hidden width of the inner MLP.

Source: Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", arXiv 2407.04620.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

InnerModel = Literal["linear", "mlp"]
Dtype = Literal["fp64", "fp32", "bf16", "fp16"]
MatmulPrecision = Literal["ieee", "tf32"]
Pass = Literal["forward", "backward", "forward_backward"]

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
INNER_MODELS: tuple[InnerModel, ...] = get_args(InnerModel)
PASSES: tuple[Pass, ...] = get_args(Pass)

# The name that NumPy (with ml_dtypes), PyTorch and JAX all give to each dtype.
ARRAY_DTYPE: dict[str, str] = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Unit in the last place of 1.0: the distance to the next larger number.
ULP: dict[str, float] = {"fp64": 2.0**-52, "fp32": 2.0**-23, "bf16": 2.0**-7, "fp16": 2.0**-10}


@dataclass(frozen=True)
class Problem:
    """The sizes and the precision of one call; hashable, and valid by construction.

    Raises:
        ValueError: a size is not a positive integer, `tokens` is not a multiple of `mini_batch`, a name is
            unknown, or `tf32` is asked for in a dtype other than fp32.
    """

    inner_model: InnerModel
    batch: int
    tokens: int
    heads: int
    head_dim: int
    mini_batch: int
    causal: bool = True
    eps: float = 1e-6
    dtype: Dtype = "fp32"
    matmul_precision: MatmulPrecision = "ieee"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(hints[field.name])
            if allowed and value not in allowed:
                raise ValueError(f"{field.name}: expected one of {', '.join(allowed)}, got {value!r}")
            if hints[field.name] is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name}: expected a positive integer, got {value!r}")
        if self.tokens % self.mini_batch:
            raise ValueError(
                f"tokens: expected a multiple of mini_batch = {self.mini_batch}, got {self.tokens}"
            )
        if not self.eps > 0:
            raise ValueError(f"eps: expected a positive number, got {self.eps!r}")
        if self.matmul_precision == "tf32" and self.dtype != "fp32":
            raise ValueError(f"matmul_precision: tf32 is a mode of fp32, expected ieee for {self.dtype}")

    @property
    def mini_batches(self) -> int:
        """N, the length of the sequential chain."""
        return self.tokens // self.mini_batch

    @property
    def hidden(self) -> int:
        """F, the hidden width of the inner MLP."""
        return 4 * self.head_dim

    @property
    def accumulate_dtype(self) -> Dtype:
        """The dtype of fast weights, statistics, accumulators and parameter gradients: fp32, or fp64 for fp64."""
        return "fp64" if self.dtype == "fp64" else "fp32"

    @property
    def axes(self) -> dict[str, int]:
        """The size of every axis letter."""
        return {
            "B": self.batch,
            "T": self.tokens,
            "H": self.heads,
            "D": self.head_dim,
            "M": self.mini_batch,
            "N": self.mini_batches,
            "F": self.hidden,
        }
