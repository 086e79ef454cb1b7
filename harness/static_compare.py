"""What changed between two static reports: kernels that vanished, began to spill, or lost what made them fast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness import static_rows
from harness.compare import Section
from harness.rows import key
from harness.static_rows import StaticRow

Severity = Literal["failure", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("failure", "warning", "info")
LINES_SHOWN = 40  # of each severity: a comment on GitHub has at most 65,536 characters


@dataclass(frozen=True)
class Finding:
    """One difference, in one line of Markdown."""

    severity: Severity
    text: str


def sections(base: Path, head: Path) -> Iterator[Section]:
    """What `compare` has to add for the static reports of two results folders; nothing where neither has one.

    Raises:
        ValueError: a report cannot be read.
    """
    if not any((folder / static_rows.FILE).exists() for folder in (base, head)):
        return
    found = differences(base, head)
    fails = any(finding.severity == "failure" for finding in found)
    lines = list(_markdown(found)) or ["No kernel changed."]
    yield Section("performance" if fails else "note", "Static kernel report", lines)


def differences(base: Path, head: Path) -> list[Finding]:
    """What `static.csv` of the folder `head` has otherwise than that of `base`, the worst first.

    A failure: a kernel that vanished, no longer compiles, spills more than before and more than it declares, fell
    back to older tensor instructions or none, or whose registers leave room for fewer blocks. Fewer for another reason
    are a warning, since deeper pipelines take shared memory on purpose.

    Raises:
        ValueError: a report cannot be read.
    """
    before, after = static_rows.load(base), static_rows.load(head)
    if after is None:
        return [Finding("failure", "head has no static report")] if before else []
    if before is None:
        before = []
        found = [Finding("info", "base has no static report: nothing to compare with")]
    else:
        found = []
    old, new = {key(row): row for row in before}, {key(row): row for row in after}
    for at, row in old.items():
        found += _pair(row, new[at]) if at in new else [_vanished(row, after)]
    for at, row in new.items():
        if at not in old:
            found += _appeared(row)
    if compilers := _compilers(before, after):
        found.append(compilers)
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def _pair(old: StaticRow, new: StaticRow) -> Iterator[Finding]:
    name = _name(new)
    if new.status != "ok":
        if old.status == "ok" or (old.status, old.reason) != (new.status, new.reason):
            severity: Severity = "failure" if old.status == "ok" or new.status == "error" else "warning"
            yield Finding(severity, f"{name}: {old.status} → {new.status}: {new.reason}")
        return
    if old.status != "ok":
        yield Finding("info", f"{name}: {old.status} → ok")
        yield from _appeared(new)
        return
    yield from _spill(name, old, new)
    yield from _blocks(name, old, new)
    tensors = f"{name}: tensor instructions {_tensors(old)} → {_tensors(new)}"
    if _generation(new) < _generation(old):
        yield Finding("failure", tensors)
    elif old.tensor_opcodes != new.tensor_opcodes:
        yield Finding("info", tensors)


def _spill(name: str, old: StaticRow, new: StaticRow) -> Iterator[Finding]:
    was, now = _spilled(old), _spilled(new)
    change = f"{name}: spills {was} → {now} bytes a thread"
    if now > was and new.undeclared_spill_bytes:
        yield Finding("failure", f"{change}, {new.declared_spill_bytes} declared")
    elif now > was:
        yield Finding("warning", f"{change}, declared")
    elif now < was:
        yield Finding("info", change)
    elif new.undeclared_spill_bytes:
        yield Finding("warning", f"{name}: still spills {now} bytes a thread, {new.declared_spill_bytes} declared")
    if (new.stack_bytes or 0) > (old.stack_bytes or 0) and now <= was:
        yield Finding("warning", f"{name}: stack {old.stack_bytes} → {new.stack_bytes} bytes a thread")


def _blocks(name: str, old: StaticRow, new: StaticRow) -> Iterator[Finding]:
    """Compared as warps on an SM, since a block may have another size now."""
    registers = f"registers {old.registers} → {new.registers}"
    blocks = f"blocks an SM {old.occupancy_blocks} → {new.occupancy_blocks} ({new.occupancy_limit})"
    was, now = _warps(old), _warps(new)
    if now < was and (new.registers or 0) > (old.registers or 0) and "registers" in new.occupancy_limit:
        yield Finding("failure", f"{name}: {registers}: {blocks}")
    elif now < was:
        yield Finding("warning", f"{name}: {blocks}")
    elif now > was:
        yield Finding("info", f"{name}: {blocks}")
    elif old.registers != new.registers:
        yield Finding("info", f"{name}: {registers}, as many blocks")


def _vanished(row: StaticRow, after: Iterable[StaticRow]) -> Finding:
    """A setting may be replaced by another; a kernel may not go without being missed."""
    name = _name(row)
    if row.status == "unsupported":
        return Finding("info", f"{name}: gone; was unsupported")
    others = (other for other in after if other.status == "ok")
    if _kernel(row) in map(_kernel, others):
        return Finding("warning", f"{name}: gone; there are other settings of this kernel")
    return Finding("failure", f"{name}: vanished")


def _appeared(row: StaticRow) -> Iterator[Finding]:
    name = _name(row)
    if row.status == "error":
        yield Finding("failure", f"{name}: new, does not compile: {row.reason}")
    elif row.undeclared_spill_bytes:
        declared = row.declared_spill_bytes
        yield Finding("failure", f"{name}: new, spills {_spilled(row)} bytes a thread, {declared} declared")
    elif row.status == "ok":
        blocks = f"{row.occupancy_blocks} blocks an SM ({row.occupancy_limit})"
        yield Finding("info", f"{name}: new: {row.registers} registers, {blocks}, tensor: {_tensors(row)}")


def _compilers(before: Iterable[StaticRow], after: Iterable[StaticRow]) -> Finding | None:
    old, new = ({row.compiler for row in rows if row.compiler} for rows in (before, after))
    if old and new and old != new:
        return Finding("info", f"other compilers: {', '.join(sorted(old))} → {', '.join(sorted(new))}")
    return None


def _markdown(found: list[Finding]) -> Iterator[str]:
    marks = {"failure": "❌", "warning": "⚠️", "info": ""}
    for severity in SEVERITIES:
        of_it = [finding for finding in found if finding.severity == severity]
        for finding in of_it[:LINES_SHOWN]:
            yield f"- {marks[severity]} {finding.text}".replace("-  ", "- ")
        if len(of_it) > LINES_SHOWN:
            yield f"- ... and {len(of_it) - LINES_SHOWN} more of severity {severity}"


def _name(row: StaticRow) -> str:
    """In code quotes, where Markdown reads no asterisk as emphasis and no `<64>` as a tag."""
    parts = row.implementation, row.inner_model, row.kernel, row.variant, row.architecture
    return f"`{' '.join(part for part in parts if part)}`"


def _spilled(row: StaticRow) -> int:
    return max(row.spill_store_bytes or 0, row.spill_load_bytes or 0)


def _warps(row: StaticRow) -> int:
    return (row.occupancy_blocks or 0) * -(-(row.threads or 0) // 32)


def _tensors(row: StaticRow) -> str:
    return row.tensor_opcodes or "none"


def _generation(row: StaticRow) -> int:
    """Which tensor cores it uses: 0 none, 1 mma (HMMA), 2 wgmma (HGMMA), 3 tcgen05 (UTCHMMA)."""
    generations = {"UTC": 3, "GMMA": 2, "MMA": 1}
    return next((number for text, number in generations.items() if text in row.tensor_opcodes), 0)


def _kernel(row: StaticRow) -> tuple[str, ...]:
    return row.implementation, row.inner_model, row.kernel, row.architecture.rstrip("af")
