"""Blocks that an SM holds: NVIDIA's published cases, and its own calculator where there is a compiler for it."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.static_occupancy import MULTIPROCESSORS, occupancy

# As the Nsight Compute occupancy calculator shows them.
KNOWN = [
    # capability, threads, registers, shared bytes, barriers -> blocks, limit
    ((80, 256, 32, 0, 0), 8, "warps,registers"),
    ((80, 1024, 64, 0, 0), 1, "registers"),
    ((80, 1024, 65, 0, 0), 0, "registers"),
    ((80, 128, 255, 0, 0), 2, "registers"),
    ((80, 128, 32, 49152, 0), 3, "shared"),
    ((80, 128, 32, 163 * 1024, 0), 1, "shared"),
    ((80, 128, 32, 163 * 1024 + 1, 0), 0, "shared"),
    ((80, 32, 16, 0, 0), 32, "blocks"),
    ((90, 128, 32, 49152, 0), 4, "shared"),
    ((90, 128, 32, 227 * 1024, 0), 1, "shared"),
    ((90, 128, 32, 0, 16), 4, "barriers"),
    ((80, 128, 32, 0, 16), 16, "warps,registers"),
    ((100, 384, 168, 100 * 1024, 0), 1, "registers"),
]


@pytest.mark.parametrize("setting, blocks, limit", KNOWN)
def test_known(setting, blocks, limit):
    found = occupancy(*setting)
    assert (found.blocks, found.limit) == (blocks, limit)


def test_tensor_memory():
    assert occupancy(100, 128, 32, 0, tensor_memory=256).blocks == 2
    assert occupancy(100, 128, 32, 0, tensor_memory=256).limit == "tensor memory"


def test_unknown_capability():
    with pytest.raises(ValueError, match="capability: expected one of 80, 90, 100, got 75"):
        occupancy(75, 128, 32, 0)


# One line of six numbers in, the blocks an SM holds out.
CALCULATOR = r"""
#include "cuda_occupancy.h"
#include <stdio.h>
int main() {
    int capability, threads, registers, shared, barriers, optin, total;
    while (scanf("%d %d %d %d %d %d %d", &capability, &threads, &registers, &shared, &barriers, &optin, &total) == 7) {
        struct cudaOccDeviceProp device = {0};
        device.computeMajor = capability / 10; device.computeMinor = capability % 10;
        device.maxThreadsPerBlock = 1024; device.maxThreadsPerMultiprocessor = 2048;
        device.regsPerBlock = 65536; device.regsPerMultiprocessor = 65536; device.warpSize = 32;
        device.sharedMemPerBlock = 49152; device.sharedMemPerMultiprocessor = total; device.numSms = 1;
        device.sharedMemPerBlockOptin = optin; device.reservedSharedMemPerBlock = 1024;
        struct cudaOccFuncAttributes kernel = {0};
        kernel.maxThreadsPerBlock = 1024; kernel.numRegs = registers; kernel.numBlockBarriers = barriers;
        kernel.maxDynamicSharedSizeBytes = optin; kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        struct cudaOccDeviceState state = {0};
        state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        struct cudaOccResult result;
        cudaOccError e = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
        printf("%d\n", e == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
    }
}
"""


def test_as_the_calculator_of_nvidia(tmp_path):
    triton, compiler = importlib.util.find_spec("triton"), shutil.which("cc")
    if not triton or not compiler:
        pytest.skip("needs triton, which has cuda_occupancy.h, and a C compiler")
    include = Path(triton.origin).parent / "backends/nvidia/include"
    (tmp_path / "calculator.c").write_text(CALCULATOR)
    program = tmp_path / "calculator"
    subprocess.run([compiler, "-I", include, tmp_path / "calculator.c", "-o", program], check=True)
    shared = (0, 1, 127, 16384, 49152, 99 * 1024, 113 * 1024, 114 * 1024, 163 * 1024, 200 * 1024, 227 * 1024)
    settings = list(
        itertools.product(MULTIPROCESSORS, (1, 32, 96, 128, 160, 384, 512, 1024), range(16, 256), shared, (0, 1, 5, 16))
    )
    sizes = {capability: f"{sm.shared_per_block} {sm.shared}" for capability, sm in MULTIPROCESSORS.items()}
    lines = "\n".join(f"{' '.join(map(str, setting))} {sizes[setting[0]]}" for setting in settings)
    done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
    theirs = [int(line) for line in done.stdout.split()]
    ours = [occupancy(*setting).blocks for setting in settings]
    assert len(theirs) == len(settings) and max(theirs) == 32
    assert [(s, a, b) for s, a, b in zip(settings, ours, theirs, strict=True) if a != b] == []
