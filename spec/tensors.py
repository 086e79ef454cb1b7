"""The tensors that go in and come out, as named tuples whose annotations are the one truth about shapes.

Validation, byte counts and the README's table all read these annotations. A tensor with a `T` axis is an
activation and is stored in the problem's dtype; every other one is a parameter or a state and is stored in its
accumulation dtype (fp32, or fp64 for an fp64 problem).

Cotangents have the type of the outputs, gradients the type of the inputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_type_hints

from jaxtyping import Float

from spec.problem import ARRAY_DTYPE, Dtype, Problem


class LinearInputs(NamedTuple):
    """What TTT-Linear reads; also the type of its gradients."""

    xq: Float[Any, "B T H D"]  # test view
    xk: Float[Any, "B T H D"]  # training view
    xv: Float[Any, "B T H D"]  # label view
    lr: Float[Any, "B T H"]  # inner learning rate of each token, base rate, gate and 1/D in it
    token_eta: Float[Any, " M"]  # decay over the position in the mini-batch
    ln_weight: Float[Any, "H D"]  # gamma of the inner LayerNorm
    ln_bias: Float[Any, "H D"]  # beta of the inner LayerNorm
    w1: Float[Any, "B H D D"]  # initial fast weights
    b1: Float[Any, "B H D"]


class MlpInputs(NamedTuple):
    """What TTT-MLP reads; also the type of its gradients."""

    xq: Float[Any, "B T H D"]  # test view
    xk: Float[Any, "B T H D"]  # training view
    xv: Float[Any, "B T H D"]  # label view
    lr: Float[Any, "B T H"]  # inner learning rate of each token, base rate, gate and 1/D in it
    token_eta: Float[Any, " M"]  # decay over the position in the mini-batch
    ln_weight: Float[Any, "H D"]  # gamma of the inner LayerNorm
    ln_bias: Float[Any, "H D"]  # beta of the inner LayerNorm
    w1: Float[Any, "B H D F"]  # initial fast weights of the first layer
    b1: Float[Any, "B H F"]
    w2: Float[Any, "B H F D"]  # initial fast weights of the second layer
    b2: Float[Any, "B H D"]


class LinearOutputs(NamedTuple):
    """What TTT-Linear returns; also the type of the cotangents it accepts."""

    out: Float[Any, "B T H D"]
    final_w1: Float[Any, "B H D D"]  # fast weights after the last token
    final_b1: Float[Any, "B H D"]


class MlpOutputs(NamedTuple):
    """What TTT-MLP returns; also the type of the cotangents it accepts."""

    out: Float[Any, "B T H D"]
    final_w1: Float[Any, "B H D F"]  # fast weights after the last token
    final_b1: Float[Any, "B H F"]
    final_w2: Float[Any, "B H F D"]
    final_b2: Float[Any, "B H D"]


Inputs = LinearInputs | MlpInputs
Outputs = LinearOutputs | MlpOutputs

INPUTS: dict[str, type[Inputs]] = {"linear": LinearInputs, "mlp": MlpInputs}
OUTPUTS: dict[str, type[Outputs]] = {"linear": LinearOutputs, "mlp": MlpOutputs}


class TensorSpec(NamedTuple):
    """The axes, sizes and storage dtype of one tensor of one problem."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}[self.dtype]


def tensor_specs(kind: type, problem: Problem) -> tuple[TensorSpec, ...]:
    """The tensors of the named tuple `kind` (say `LinearInputs`), in its order, at the sizes of `problem`."""
    return _tensor_specs(kind, problem)


@functools.lru_cache(maxsize=256)  # a call checks its tensors while the device waits for it
def _tensor_specs(kind: type, problem: Problem) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            name,
            axes,
            tuple(problem.axes[axis] for axis in axes),
            problem.dtype if "T" in axes else problem.accumulate_dtype,
        )
        for name, axes in _annotated_axes(kind)
    )


def validate(tensors: tuple[Any, ...], kinds: Mapping[str, type], problem: Problem) -> None:
    """Check that `tensors` are those of `kinds` (`INPUTS` or `OUTPUTS`) for `problem`, before anything is allocated.

    Works on the arrays of every framework: it reads `.shape` and `.dtype` alone.

    Raises:
        ValueError: the tuple is of the wrong type, or a tensor has another shape or dtype; the message names
            the tensor, what was expected and what came.
    """
    kind = kinds[problem.inner_model]
    if type(tensors) is not kind:
        raise ValueError(f"tensors of {problem.inner_model}: expected {kind.__name__}, got {type(tensors).__name__}")
    for spec, tensor in zip(tensor_specs(kind, problem), tensors, strict=True):
        shape = tuple(tensor.shape)
        if shape != spec.shape:
            axes = ", ".join(spec.axes)
            raise ValueError(f"{spec.name}: expected ({axes}) = {spec.shape}, got {shape}")
        dtype = str(tensor.dtype).rpartition(".")[2]
        if dtype != ARRAY_DTYPE[spec.dtype]:
            raise ValueError(f"{spec.name}: expected {ARRAY_DTYPE[spec.dtype]}, got {dtype}")


def _annotated_axes(kind: type) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((name, tuple(hint.dim_str.split())) for name, hint in get_type_hints(kind).items())
