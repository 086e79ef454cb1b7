"""flash-linear-attention's `chunk_ttt_linear`: one kernel for the chain of states, others for all chunks at once."""

from __future__ import annotations

from fla.ops.ttt.chunk import ChunkTTTLinearFunction

from implementations.peers import fla_linear, recorded
from implementations.peers.recorded import Graph, backward
from spec.problem import Problem
from spec.tensors import LinearInputs, LinearOutputs

__all__ = ["backward", "forward"]


def forward(inputs: LinearInputs, problem: Problem) -> tuple[LinearOutputs, Graph]:
    """Outputs of TTT-Linear, and what `backward` needs; see `fla_linear`."""
    return recorded.forward(_run, inputs, problem)


def _run(inputs: LinearInputs, problem: Problem) -> LinearOutputs:
    return fla_linear.run(lambda *arguments: ChunkTTTLinearFunction.apply(*arguments, None), inputs, problem)
