"""The primitives of `device.cuh` as the emulator runs them, against NumPy; and what it must not let pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch

from harness import static_cuda
from harness.static_binary import MissingTool
from implementations.cuda import emulator
from implementations.cuda.module import pack
from implementations.kernels import ARCHITECTURES, CudaKernel

SOURCE = Path(__file__).with_name("kernels") / "primitives.cu"
DTYPES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}
emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


class Arguments(NamedTuple):
    given: Any
    out: Any
    n: int


def kernel(expression: str, threads: int = 32, shared: int = 1024, **more: Any) -> CudaKernel:
    includes = f"--include-path={Path(emulator.__file__).parents[1] / 'kernels'}"
    return CudaKernel(
        source=SOURCE,
        expression=expression,
        inner_model="linear",
        threads=threads,
        dynamic_shared_bytes=shared,
        options=("--std=c++17", includes, *more.pop("options", ())),
        **more,
    )


def run(which: CudaKernel, given: np.ndarray, out: torch.Tensor, n: int = 0, grid: int = 1, order: int = 0) -> None:
    emulator.run(which, grid, pack(Arguments(torch.from_numpy(given.view(np.uint8)), out, n)), order)


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_to_nearest_even(dtype: str) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 40000, dtype=np.uint32)
    near = random.standard_normal(20000).astype(np.float32).astype(DTYPES[dtype]).astype(np.float32)
    half = near.view(np.uint32) + (1 << (15 if dtype == "bf16" else 12))  # ties
    tiny = (random.standard_normal(20000) * 2.0**-20).astype(np.float32).view(np.uint32)  # subnormal in fp16
    edges = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.9, 65520, 1e9, 3.4e38], np.float32)
    values = np.concatenate([bits, half, tiny, edges.view(np.uint32)]).view(np.float32)
    out = torch.full(values.shape, float("nan"))
    run(kernel(f"ttt::round_trip<ttt::{dtype}>", 64), values, out, len(values), grid=3)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(DTYPES[dtype]).astype(np.float32)
    np.testing.assert_array_equal(out.numpy(), expected)


@emulated
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fragments(dtype: str, order: int) -> None:
    given = np.random.default_rng(1).standard_normal(16 * 16 + 16 * 8).astype(DTYPES[dtype])
    out = torch.full((128 + 128,), float("nan"))
    run(kernel(f"ttt::product<ttt::{dtype}>"), given, out, order=order)
    a, b = given[:256].reshape(16, 16), given[256:].reshape(16, 8)
    expected = a.astype(np.float32) @ b.astype(np.float32)
    np.testing.assert_allclose(out[:128].numpy().reshape(16, 8), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[128:].numpy().view(np.uint16), a.reshape(-1).view(np.uint16))


@emulated
def test_tf32_drops_what_tensor_cores_drop() -> None:
    given = np.random.default_rng(2).standard_normal(16 * 8 + 8 * 8).astype(np.float32)
    out = torch.full((128,), float("nan"))
    run(kernel("ttt::product_tf32"), given, out)
    cut = (given.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    expected = cut[:128].reshape(16, 8) @ cut[128:].reshape(8, 8)
    np.testing.assert_allclose(out.numpy().reshape(16, 8), expected, rtol=1e-5, atol=1e-5)


@emulated
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("options", [(), ("-DTTT_UCONTEXT",)], ids=["own switch", "ucontext"])
def test_named_barriers(order: int, options: tuple[str, ...]) -> None:
    out = torch.full((9, 32), float("nan"))
    run(kernel("ttt::hand_over", 96, options=options), np.zeros(16, np.uint8), out, 9, order=order)
    assert torch.equal(out, (3.0 * torch.arange(9) + 31 * 16)[:, None].expand(9, 32))


def exchange(fault: int = 0, order: int = 0, rounds: int = 5) -> torch.Tensor:
    out = torch.full((4, rounds, 32, 7), -1.0)
    which = kernel("ttt::exchange", shared=2048, cluster=2, options=("-DCLUSTERS",))
    run(which, np.zeros(16, np.uint8), out, rounds + 16 * fault, grid=4, order=order)
    return out


@emulated
@pytest.mark.parametrize("order", [0, 1])
def test_stores_into_another_block(order: int) -> None:
    block, i, lane, k = torch.meshgrid(*map(torch.arange, (4, 5, 32, 7)), indexing="ij")
    assert torch.equal(exchange(order=order), (7 * lane + k + i + 100 * (1 - block % 2)).float())


@emulated
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, "waits forever at mbarrier_wait, as do 64 of 64 threads"),
        (2, "ended before it had waited for what others stored"),
        (3, "mbarrier: 4 bytes more than expected"),
    ],
)
def test_faults_of_stores_are_reported(fault: int, message: str) -> None:
    with pytest.raises(emulator.EmulatorError, match=message):
        exchange(fault)


@emulated
def test_a_store_is_nan_until_it_is_waited_for() -> None:
    assert exchange(4)[1].isnan().any()


@emulated
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (0, "waits forever at sync, as do 32 of 64 threads; 32 have finished"),
        (1, r"wrote byte \d+ past the 1024 bytes of shared memory"),
        (2, "copy_async_16: an address in shared memory is no multiple of 16"),
        (3, "where other lanes of the warp are at"),
        (6, "named_sync of 96 threads, where others wait for 64|no barrier 1 of 96 threads in a block of 64"),
    ],
)
def test_faults_are_reported(fault: int, message: str) -> None:
    with pytest.raises(emulator.EmulatorError, match=message):
        run(kernel("ttt::faulty", 64), np.zeros(16, np.uint8), torch.zeros(64), fault)


@emulated
def test_shared_memory_starts_as_nan() -> None:
    out = torch.zeros(64)
    run(kernel("ttt::faulty", 64), np.zeros(16, np.uint8), out, 4)
    assert out.isnan().all()


@emulated
def test_a_copy_is_nan_until_it_is_waited_for() -> None:
    out = torch.zeros(64)
    run(kernel("ttt::faulty", 64), np.ones(4, np.float32), out, 5)
    assert out[0].isnan()
    assert out[1] == 1


@emulated
def test_what_does_not_compile() -> None:
    with pytest.raises(emulator.EmulatorError, match="nowhere: g\\+\\+ refuses it: .*error"):
        run(kernel("nowhere"), np.zeros(16, np.uint8), torch.zeros(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("expression", ["round_trip<ttt::bf16>", "product<ttt::fp16>", "product_tf32", "hand_over"])
def test_compiles_for_gpus(expression: str, architecture: str) -> None:
    try:
        static_cuda.compile(kernel(f"ttt::{expression}"), architecture)
        if architecture != "sm_80":
            static_cuda.compile(kernel("ttt::exchange", cluster=2, options=("-DCLUSTERS",)), architecture)
    except MissingTool as error:
        pytest.skip(str(error))
