"""The rows of `static.csv`: what the compilers make of each kernel, on no GPU at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_type_hints

from harness import records
from harness.rows import check_names, columns
from spec.problem import InnerModel

FILE = "static.csv"


@dataclass(frozen=True, kw_only=True)
class StaticRow:
    """One kernel in one setting, compiled for one architecture.

    Attributes:
        kernel, variant: its name, and the setting in one line; both empty if an implementation's list of kernels
            could not be read.
        architecture: what it was compiled for, suffix included: sm_90a.
        compiler: name and version.
        status: `unsupported` if a tool is not installed or the kernel is not written for the architecture.
        registers, spill_store_bytes, spill_load_bytes, stack_bytes: of a thread.
        static_shared_bytes, dynamic_shared_bytes, barriers, threads, tensor_memory_columns: of a block.
        occupancy_blocks, occupancy_limit: blocks that an SM holds, and what allows no more.
        instructions and those after it: see `harness.static_sass.Mix`.

    Raises:
        ValueError: a name is unknown, a text has a line break, a status other than `ok` has no reason, or a row
            that is `ok` lacks a number.
    """

    implementation: str
    inner_model: Literal[InnerModel, ""]
    kernel: str
    variant: str
    architecture: str
    compiler: str = ""
    status: Literal["ok", "error", "unsupported"]
    reason: str = ""
    registers: int | None = None
    spill_store_bytes: int | None = None
    spill_load_bytes: int | None = None
    declared_spill_bytes: int = 0
    stack_bytes: int | None = None
    static_shared_bytes: int | None = None
    dynamic_shared_bytes: int | None = None
    barriers: int | None = None
    threads: int | None = None
    tensor_memory_columns: int | None = None
    occupancy_blocks: int | None = None
    occupancy_limit: str = ""
    instructions: int | None = None
    tensor_instructions: int | None = None
    tensor_opcodes: str = ""
    global_loads_16: int | None = None
    global_loads_32: int | None = None
    global_loads_64: int | None = None
    global_loads_128: int | None = None
    async_copies: int | None = None
    shared_accesses: int | None = None
    barrier_instructions: int | None = None
    special_function: int | None = None
    source_hash: str
    git_sha: str

    KEY: ClassVar[tuple[str, ...]] = ("implementation", "inner_model", "kernel", "variant", "architecture")

    def __post_init__(self) -> None:
        check_names(self)
        if self.status != "ok" and not self.reason.strip():
            raise ValueError(f"reason: expected one line for status {self.status}, got {self.reason!r}")
        missing = [name for name in _NUMBERS if getattr(self, name) is None]
        if self.status == "ok" and missing:
            raise ValueError(f"{missing[0]}: expected a number for status ok, got None")

    @property
    def undeclared_spill_bytes(self) -> int:
        """What it spills, stores or loads, if that is more than its file declares; else 0."""
        spilled = max(self.spill_store_bytes or 0, self.spill_load_bytes or 0)
        return spilled if spilled > self.declared_spill_bytes else 0

    @property
    def is_right(self) -> bool:
        """Whether it compiles, or is not meant to here, and spills no more than it declares."""
        return self.status != "error" and not self.undeclared_spill_bytes


_NUMBERS = [name for name, hint in get_type_hints(StaticRow).items() if hint == int | None]


def write(folder: Path, found: Sequence[StaticRow]) -> Path:
    """Put these rows in place of the folder's report; one without rows says that there are no kernels."""
    path, beside = folder / FILE, folder / f".{FILE}.{os.getpid()}.tmp"
    try:
        beside.write_text(",".join(columns(StaticRow)) + "\n", encoding="utf-8")
        records.append(beside, found)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def load(folder: Path) -> list[StaticRow] | None:
    """The rows of the folder's report; None where it has none.

    Raises:
        ValueError: the file has other columns, or cannot be read.
    """
    path = folder / FILE
    return records.load(path, StaticRow) if path.exists() else None
