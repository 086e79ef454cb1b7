"""What a kernel is made of: instructions counted by kind in the disassembled machine code (SASS).

A count is of the text, not of what runs: a loop body counts once. NOPs, which pad the end, do not count.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_SECTION = re.compile(r"^\.text\.(\S+):$")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Za-z0-9_.]*)")
_TENSOR = re.compile(r"[HIDBQO]G?MMA|UTC\w*MMA")  # mma.sync, wgmma and tcgen05.mma, in every type
_WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)\b")
_SHARED = frozenset({"LDS", "STS", "LDSM", "STSM", "ATOMS"})
_ASYNC = frozenset({"LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP"})
_BARRIERS = frozenset({"BAR", "SYNCS", "UCGABAR_ARV", "UCGABAR_WAIT"})


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Instructions of one kernel.

    Attributes:
        tensor_opcodes: those of the tensor cores, as `count x opcode` with semicolons between, the commonest first.
        global_loads_16: of 8 and 16 bits; generic loads (LD) count as global ones throughout.
        global_loads_128: of 128 bits and more.
        async_copies: between global and shared memory, past the registers (cp.async, TMA).
        barrier_instructions: bar.sync, mbarrier and cluster barrier instructions.
        special_function: exp2, log2, rsqrt, reciprocal, sin, cos, tanh (MUFU).
    """

    instructions: int
    tensor_instructions: int
    tensor_opcodes: str
    global_loads_16: int
    global_loads_32: int
    global_loads_64: int
    global_loads_128: int
    async_copies: int
    shared_accesses: int
    barrier_instructions: int
    special_function: int


def disassemble(nvdisasm: Path, cubin: bytes) -> str:
    """The SASS of every function in `cubin`.

    Raises:
        RuntimeError: nvdisasm refused it; the message is its last line.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(nvdisasm), "--print-code", "--no-dataflow", file.name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


def mix(sass: str, entry: str) -> Mix:
    """What the function `entry` in `sass` consists of.

    Raises:
        ValueError: there is no such function.
    """
    opcodes = Counter(_opcodes(sass, entry))
    if not opcodes:
        raise ValueError(f"sass: expected the function {entry}, found none")

    def count(of: frozenset[str]) -> int:
        return sum(number for opcode, number in opcodes.items() if _base(opcode) in of)

    tensor = Counter({opcode: number for opcode, number in opcodes.items() if _TENSOR.fullmatch(_base(opcode))})
    widths: Counter[int] = Counter()
    for opcode, number in opcodes.items():
        if _base(opcode) in ("LDG", "LD"):
            widths[_width(opcode)] += number
    return Mix(
        instructions=opcodes.total(),
        tensor_instructions=tensor.total(),
        tensor_opcodes="; ".join(f"{number} x {opcode}" for opcode, number in tensor.most_common()),
        global_loads_16=widths[8] + widths[16],
        global_loads_32=widths[32],
        global_loads_64=widths[64],
        global_loads_128=widths[128] + widths[256],
        async_copies=count(_ASYNC),
        shared_accesses=count(_SHARED),
        barrier_instructions=count(_BARRIERS),
        special_function=count(frozenset({"MUFU"})),
    )


def _opcodes(sass: str, entry: str) -> list[str]:
    found, inside = [], False
    for line in sass.splitlines():
        if section := _SECTION.match(line):
            inside = section[1] == entry
        elif inside and (instruction := _INSTRUCTION.match(line)) and instruction[1] != "NOP":
            found.append(instruction[1])
    return found


def _base(opcode: str) -> str:
    return opcode.partition(".")[0]


def _width(opcode: str) -> int:
    return max(map(int, _WIDTH.findall(opcode)), default=32)
