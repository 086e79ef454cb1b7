"""Somebody's implementation that is registered nowhere."""

from __future__ import annotations

import os

from implementations.registry import Implementation
from implementations.torch import ttt_linear
from implementations.torch.ttt_linear import backward

__all__ = ["ENTRY", "backward", "backward_without_lr", "crash", "forward", "forward_without_state", "wrong_forward"]
ENTRY = Implementation("toy.entry", "torch", {"linear": "tests.toy"})


def forward(inputs, problem):
    return ttt_linear.forward(inputs, problem)


def wrong_forward(inputs, problem):
    outputs, residuals = ttt_linear.forward(inputs, problem)
    return outputs._replace(out=outputs.out * 1.01), residuals


def forward_without_state(inputs, problem):
    outputs, residuals = ttt_linear.forward(inputs, problem)
    return outputs._replace(final_b1=0.0), residuals


def backward_without_lr(cotangents, residuals, problem):
    return backward(cotangents, residuals, problem)._replace(lr=None)


def crash(inputs, problem):
    os.abort()
