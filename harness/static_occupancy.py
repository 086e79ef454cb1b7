"""How many blocks of a kernel one SM holds at once, and what runs out first.

The rules and numbers are those of NVIDIA's own calculator, `cuda_occupancy.h` of the CUDA toolkit (13.1), and of
table "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide; the tests hold this page
against that header. It knows no tensor memory: the 512 columns of an SM are from "Tensor Memory" of the PTX ISA.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # of an SM, and the most of a block
REGISTERS_PER_THREAD = 255
REGISTER_UNIT = 256  # a warp's registers are allocated in units of this
SUB_PARTITIONS = 4  # of an SM; a warp lives in one
SHARED_UNIT = 128
SHARED_RESERVED = 1024  # of each block, by the driver
THREADS_PER_BLOCK = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """What one SM of a compute capability has; bytes of shared memory, columns of tensor memory."""

    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    barriers: int | None = None
    tensor_memory: int | None = None


MULTIPROCESSORS = {
    80: Multiprocessor(warps=64, blocks=32, shared=164 * 1024, shared_per_block=163 * 1024),
    90: Multiprocessor(warps=64, blocks=32, shared=228 * 1024, shared_per_block=227 * 1024, barriers=64),
    100: Multiprocessor(
        warps=64, blocks=32, shared=228 * 1024, shared_per_block=227 * 1024, barriers=64, tensor_memory=512
    ),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks that one SM holds, and the resources that allow no more, with commas between."""

    blocks: int
    limit: str


def occupancy(
    capability: int, threads: int, registers: int, shared_bytes: int, barriers: int = 0, tensor_memory: int = 0
) -> Occupancy:
    """Of a block of `threads` with `registers` each, static and dynamic `shared_bytes`, named `barriers`, and columns.

    Raises:
        ValueError: nothing is known of the capability.
    """
    if capability not in MULTIPROCESSORS:
        raise ValueError(f"capability: expected one of {', '.join(map(str, MULTIPROCESSORS))}, got {capability}")
    sm = MULTIPROCESSORS[capability]
    warps = -(-threads // WARP)
    limits = {
        "warps": sm.warps // warps if threads <= THREADS_PER_BLOCK else 0,
        "blocks": sm.blocks,
        "registers": _by_registers(registers, warps),
        "shared": _by_shared(shared_bytes, sm),
    }
    if sm.barriers and barriers:
        limits["barriers"] = sm.barriers // barriers
    if sm.tensor_memory and tensor_memory:
        limits["tensor memory"] = sm.tensor_memory // tensor_memory
    blocks = min(limits.values())
    return Occupancy(blocks, ",".join(name for name, limit in limits.items() if limit == blocks))


def _by_registers(registers: int, warps: int) -> int:
    per_warp = _round_up(registers * WARP, REGISTER_UNIT)
    if registers > REGISTERS_PER_THREAD or per_warp * _round_up(warps, SUB_PARTITIONS) > REGISTERS:
        return 0
    return REGISTERS // SUB_PARTITIONS // per_warp * SUB_PARTITIONS // warps


def _by_shared(shared_bytes: int, sm: Multiprocessor) -> int:
    if shared_bytes > sm.shared_per_block:
        return 0
    return sm.shared // _round_up(shared_bytes + SHARED_RESERVED, SHARED_UNIT)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
