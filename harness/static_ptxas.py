"""What `ptxas -v` says of a kernel: registers, spills, stack, shared memory, barriers."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one kernel takes of an SM; registers are a thread's, bytes of spills and stack too."""

    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    static_shared_bytes: int
    barriers: int


_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


def usage(log: str, entry: str) -> Usage:
    """Of the kernel `entry` in the log of a compilation with `ptxas -v`.

    Raises:
        ValueError: the log does not say.
    """
    _, *parts = _ENTRY.split(log)
    text = dict(zip(parts[::2], parts[1::2], strict=True)).get(entry, "")
    stack, registers = _STACK.search(text), _REGISTERS.search(text)
    if not stack or not registers:
        raise ValueError(f"ptxas -v: expected registers and spills of {entry}, got {log.strip()[-200:]!r}")
    line = text[registers.start() :].partition("\n")[0]
    return Usage(
        registers=int(registers[1]),
        spill_store_bytes=int(stack[2]),
        spill_load_bytes=int(stack[3]),
        stack_bytes=int(stack[1]),
        static_shared_bytes=_number(r"(\d+) bytes smem", line),
        barriers=_number(r"used (\d+) barriers", line),
    )


def _number(pattern: str, line: str) -> int:
    found = re.search(pattern, line)
    return int(found[1]) if found else 0
