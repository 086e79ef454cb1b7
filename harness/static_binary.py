"""What a compiler hands to the static report: machine code, its log, and how it is launched."""

from __future__ import annotations

from dataclasses import dataclass


class MissingTool(Exception):
    """A compiler or a tool is not installed; the message is the reason in one line."""


class CompileError(Exception):
    """The compiler refused a kernel; the message is the reason in one line."""


@dataclass(frozen=True, kw_only=True)
class Binary:
    """One kernel, compiled.

    Attributes:
        cubin: the ELF file with its machine code.
        log: of `ptxas -v`.
        entry: the kernel's symbol in both.
        threads, dynamic_shared_bytes: of a block.
        tensor_memory_columns: of a block; a Blackwell SM has 512.
    """

    cubin: bytes
    log: str
    entry: str
    threads: int
    dynamic_shared_bytes: int
    tensor_memory_columns: int = 0


def first_error(log: str) -> str:
    """The line of a compiler's log that says what is wrong, else its last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for word in ("fatal", "error", "Error"):
        if telling := [line for line in lines if word in line]:
            return telling[0][:300]
    return (lines[-1:] or ["no message"])[0][:300]
