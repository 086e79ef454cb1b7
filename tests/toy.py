"""Somebody's implementation that is registered nowhere."""

from __future__ import annotations

import os

from implementations.registry import Implementation
from implementations.torch import ttt_linear
from implementations.torch.ttt_linear import backward

__all__ = ["ENTRY", "backward", "crash", "forward", "wrong_forward"]
ENTRY = Implementation("toy.entry", "torch", {"linear": "tests.toy"})


def forward(inputs, problem):
    return ttt_linear.forward(inputs, problem)


def wrong_forward(inputs, problem):
    outputs, residuals = ttt_linear.forward(inputs, problem)
    return outputs._replace(out=outputs.out * 1.01), residuals


def crash(inputs, problem):
    os.abort()
