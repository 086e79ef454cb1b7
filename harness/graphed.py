"""The forward of `torch.eager` as one CUDA graph: a page for proofs about timing, in which no launch is waited for."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from harness.spin import spin
from spec.problem import Problem

SLOWDOWN = 0.05
_graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Any]] = {}


def forward(inputs: Any, problem: Problem, slowdown: float = 0.0) -> tuple[Any, None]:
    """Replay the graph of these very tensors; the outputs are those of the last replay."""
    key = problem, slowdown, tuple(tensor.data_ptr() for tensor in inputs)
    if key not in _graphs:
        graph, outputs = _capture(inputs, problem, 0)
        if slowdown:
            graph, outputs = _capture(inputs, problem, round(slowdown * _milliseconds(graph) * 1e6))
        _graphs[key] = graph, outputs
    graph, outputs = _graphs[key]
    graph.replay()
    return outputs, None


forward_slow = functools.partial(forward, slowdown=SLOWDOWN)


def _capture(inputs: Any, problem: Problem, spin_ns: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    page, graph = importlib.import_module(f"implementations.torch.ttt_{problem.inner_model}"), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        page.forward(inputs, problem)
        _spin(spin_ns)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs, _ = page.forward(inputs, problem)
        _spin(spin_ns)
    return graph, outputs


def _spin(ns: int) -> None:
    if ns:
        spin(ns)


def _milliseconds(graph: torch.cuda.CUDAGraph) -> float:
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[4]
