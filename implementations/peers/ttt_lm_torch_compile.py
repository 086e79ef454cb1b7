"""The official PyTorch formulation with `torch.compile` around the step of one mini-batch; see `ttt_lm_torch`.

The loop over mini-batches stays in Python: compiling it whole would unroll the chain.
"""

from __future__ import annotations

import functools

import torch
import torch._dynamo

from implementations.peers import recorded, ttt_lm_torch
from implementations.peers.recorded import Graph, backward
from spec.problem import Problem
from spec.tensors import Inputs, Outputs

__all__ = ["backward", "forward"]

# One program for each problem, as a user has who has one, without end: past PyTorch's limit of 8 it would raise.
_PROGRAMS = torch._dynamo.config.patch(recompile_limit=2**16, accumulated_recompile_limit=2**16)


@functools.cache
def _compiled(inner_model: str) -> ttt_lm_torch.Step:
    return torch.compile(ttt_lm_torch.STEPS[inner_model], fullgraph=True, dynamic=False)


def forward(inputs: Inputs, problem: Problem) -> tuple[Outputs, Graph]:
    """Outputs, and the autograd graph that `backward` follows."""
    run = functools.partial(ttt_lm_torch.run, _compiled(problem.inner_model))
    with _PROGRAMS:
        return recorded.forward(run, inputs, problem)
