"""Launches in several CUDA streams at once, forked from the current stream and joined to it again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from implementations.triton.launch import Launch


class Step(NamedTuple):
    """A launch on lane `lane`, after those before it there and after the steps `after` on other lanes.

    Lane 0 is the current stream. The others have priority: they are for the few programs that others wait for.
    """

    launch: Launch
    lane: int = 0
    after: tuple[int, ...] = ()


def run(steps: Sequence[Step], device: torch.device) -> None:
    """Run every step; work on the current stream before and after it keeps its order."""
    lanes = 1 + max(step.lane for step in steps)
    if device.type != "cuda" or lanes == 1:
        for step in steps:
            step.launch.run(device)
        return
    current = torch.cuda.current_stream(device)
    streams = [current, *(_stream(device, lane) for lane in range(1, lanes))]
    begun = current.record_event()
    for stream in streams[1:]:
        stream.wait_event(begun)
    awaited = {index for step in steps for index in step.after if steps[index].lane != step.lane}
    done = {}
    for index, step in enumerate(steps):
        stream = streams[step.lane]
        for other in step.after:
            if steps[other].lane != step.lane:
                stream.wait_event(done[other])
        with torch.cuda.stream(stream):
            step.launch.run(device)
        if index in awaited:
            done[index] = stream.record_event()
    for stream in streams[1:]:
        current.wait_event(stream.record_event())


@functools.cache
def _stream(device: torch.device, lane: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)
