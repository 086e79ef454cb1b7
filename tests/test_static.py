"""The static report on kernels of the tests' own: what it counts, and what turns it red."""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace

import pytest

from harness import command, static, static_cuda, static_rows, static_triton
from harness.static import failures, report
from harness.static_binary import CompileError, MissingTool
from harness.static_ptxas import usage
from harness.static_sass import mix
from implementations.registry import Implementation

try:
    static_cuda.version(), static_triton.version(), static_triton.tool("nvdisasm")
except (MissingTool, CompileError) as missing:
    needs_compilers = pytest.mark.skip(reason=str(missing))
else:
    needs_compilers = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

COMMON = {"implementation": "x", "source_hash": "", "git_sha": ""}


def implementation(name: str) -> Implementation:
    module = f"tests.kernels.{name}"
    return Implementation(f"test.{name}", "torch", {"linear": module}, kernels=module)


@functools.cache  # compiling takes most of a second a kernel
def compiled(name: str, *architectures: str) -> list[static_rows.StaticRow]:
    return list(report([implementation(name)], architectures))


def test_processes_give_the_same_rows_in_the_same_order():
    architectures = "sm_80", "sm_90"
    found = list(report([implementation("good"), implementation("good")], architectures, jobs=2))
    assert found == [*compiled("good", *architectures)] * 2


def named(rows, kernel: str, compiler: str):
    (row,) = [row for row in rows if row.kernel == kernel and row.compiler.startswith(compiler)]
    return row


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command on kernels of these names: its exit code, and the folder with the report."""

    def run(*names: str, architectures: str = "sm_80") -> tuple[int, object]:
        monkeypatch.setattr(static, "select", lambda keys: [implementation(name) for name in names])
        arguments = ["static", "--results", str(tmp_path), "--architectures", architectures, "--jobs", "1"]
        return command.main(arguments), tmp_path

    return run


def test_no_kernels(run, capsys):
    code, folder = run()
    assert code == 0 and "no kernels registered yet" in capsys.readouterr().out
    assert static_rows.load(folder) == []


def test_no_report(tmp_path):
    assert static_rows.load(tmp_path) is None


@needs_compilers
def test_good_kernels(run, capsys):
    code, folder = run("good")
    rows = static_rows.load(folder)
    assert code == 0 and len(rows) == 3 and not list(failures(rows))
    assert all(row.status == "ok" and row.spill_store_bytes == row.spill_load_bytes == 0 for row in rows)
    assert all(row.source_hash and row.git_sha and row.registers for row in rows)
    assert "no kernels" not in capsys.readouterr().out


@needs_compilers
@pytest.mark.parametrize("architecture, triton", [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")])
def test_tensor_instructions_are_counted(architecture, triton):
    rows = compiled("good", architecture)
    product, wmma, add = named(rows, "product", "triton"), named(rows, "product", "nvrtc"), named(rows, "add", "triton")
    assert f"x {triton}" in product.tensor_opcodes and product.tensor_instructions > 0
    assert wmma.tensor_opcodes == "8 x HMMA.16816.F32.BF16"  # 64 / 16 products of 16x16x16, two instructions each
    assert add.tensor_instructions == 0 and add.tensor_opcodes == ""


@needs_compilers
def test_what_a_kernel_takes():
    rows = compiled("good", "sm_80")
    wmma, product, add = named(rows, "product", "nvrtc"), named(rows, "product", "triton"), named(rows, "add", "triton")
    assert (wmma.static_shared_bytes, wmma.dynamic_shared_bytes) == (1024, 128)
    assert (wmma.threads, wmma.barriers, wmma.occupancy_blocks, wmma.occupancy_limit) == (32, 1, 32, "blocks")
    assert (product.threads, product.static_shared_bytes, product.dynamic_shared_bytes) == (128, 0, 2 * 64 * 64 * 2)
    assert product.global_loads_128 == 8  # 2 x 64 x 64 bf16 over 128 threads of 16 bytes
    assert product.shared_accesses > 0 and product.barrier_instructions > 0
    # A product is over a mask that nothing is known of: 2 x 8 loads of one fp32 a thread.
    assert (add.global_loads_32, add.global_loads_128, add.shared_accesses) == (16, 0, 0)
    assert wmma.special_function > 0 and add.special_function == 0


@needs_compilers
def test_triton_adds_the_suffix_and_cuda_asks_for_it():
    assert {row.architecture for row in compiled("good", "sm_90")} == {"sm_90", "sm_90a"}
    kernel = replace(list(importlib.import_module("tests.kernels.good").static_kernels())[2], architectures=("sm_90a",))
    at_90, at_80 = (static._of_kernel(COMMON, kernel, wanted) for wanted in ("sm_90", "sm_80"))
    assert (at_90.status, at_90.architecture) == ("ok", "sm_90a")
    assert (at_80.status, at_80.reason) == ("unsupported", "written for sm_90a")


@needs_compilers
def test_planted_spills_turn_it_red(run, capsys):
    code, folder = run("spilling")
    rows = static_rows.load(folder)
    assert code == 1 and [row.compiler.split()[0] for row in rows] == ["triton", "nvrtc"]
    assert all(row.status == "ok" and row.undeclared_spill_bytes > 0 for row in rows)
    out = capsys.readouterr().out
    assert "spill: test.spilling linear product [" in out and "spill: test.spilling linear reversed [" in out


@needs_compilers
def test_declared_spill_is_none():
    row = compiled("spilling", "sm_80")[1]
    assert row.spill_store_bytes == row.undeclared_spill_bytes > 0
    assert not replace(row, declared_spill_bytes=row.spill_store_bytes).undeclared_spill_bytes
    assert replace(row, declared_spill_bytes=row.spill_store_bytes - 1).undeclared_spill_bytes


@needs_compilers
def test_kernels_that_do_not_compile(run):
    code, folder = run("broken")
    refused, undefined = static_rows.load(folder)
    assert code == 1 and refused.status == undefined.status == "error"
    assert "power of 2" in refused.reason and 'identifier "K" is undefined' in undefined.reason


@needs_compilers
def test_block_that_fits_on_no_sm():
    wmma = list(importlib.import_module("tests.kernels.good").static_kernels())[2]
    large = replace(wmma, dynamic_shared_bytes=200 * 1024)
    row = static._of_kernel(COMMON, large, "sm_80")
    assert (row.status, row.reason) == ("error", "no block fits on an SM: too much of shared")
    assert static._of_kernel(COMMON, large, "sm_90").status == "ok"


def test_missing_tool(run, monkeypatch, capsys):
    def missing():
        raise MissingTool("the compiler is not installed")

    monkeypatch.setattr(static_triton, "version", missing)
    monkeypatch.setattr(static_cuda, "version", missing)
    pytest.importorskip("triton")  # the listing imports it
    code, folder = run("good")
    assert code == 0 and {row.status for row in static_rows.load(folder)} == {"unsupported"}
    assert "the compiler is not installed" in capsys.readouterr().out


def test_missing_disassembler(tmp_path, monkeypatch):
    monkeypatch.setattr(static_triton.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingTool, match="nvdisasm is not installed"):
        static_triton.tool("nvdisasm")


@pytest.mark.parametrize(
    "source, status, reason",
    [
        ("import no_such_framework", "unsupported", "ModuleNotFoundError: No module named 'no_such_framework'"),
        ("raise ModuleNotFoundError('gone', name='listing.gone')", "error", "ModuleNotFoundError: gone"),
        ("1 / 0", "error", "ZeroDivisionError: division by zero"),
        ("", "error", "AttributeError: module 'listing' has no attribute 'static_kernels'"),
    ],
)
def test_listing_that_cannot_be_read(source, status, reason, tmp_path, monkeypatch):
    (tmp_path / "listing.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.sys.modules, "listing", raising=False)
    (row,) = report([Implementation("x.y", "torch", {"linear": "listing"}, kernels="listing")], ["sm_80"])
    assert (row.status, row.kernel, row.reason) == (status, "", f"listing: {reason}")


def test_missing_listing_is_an_error():
    (row,) = report([Implementation("x.y", "torch", {"linear": "a"}, kernels="no_such_listing")], ["sm_80"])
    assert row.status == "error" and "no_such_listing" in row.reason


def test_twins_are_refused(monkeypatch):
    pytest.importorskip("triton")
    good = importlib.import_module("tests.kernels.good")
    kernels = list(good.static_kernels())
    monkeypatch.setattr(good, "static_kernels", lambda: [kernels[0], kernels[0]])
    with pytest.raises(ValueError, match=r"test\.good: kernel linear add \*fp32.* is listed twice"):
        list(report([implementation("good")]))


def test_instructions_of_the_entry_alone():
    sass = """
.text.other:
        /*0000*/                   HMMA.16816.F32 R12, R24, R12, RZ ;
.text.entry:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR8][R4.64] ;
        /*0020*/                   LDG.E.U16 R4, desc[UR8][R4.64] ;
        /*0030*/                   LD.E R4, desc[UR8][R4.64] ;
        /*0040*/                   LDG.E.LTC128B.64 R4, [R4.64] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR8][R4.64] ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0070*/              @P1  MUFU.EX2 R3, R3 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   LDS.128 R4, [R2] ;
        /*00a0*/                   NOP;
.L_x_1:
"""
    found = mix(sass, "entry")
    assert found.instructions == 10 and found.tensor_opcodes == "1 x HGMMA.64x64x16.F32.BF16"
    loads = found.global_loads_16, found.global_loads_32, found.global_loads_64, found.global_loads_128
    assert loads == (1, 1, 1, 1) and found.async_copies == 1
    assert (found.special_function, found.barrier_instructions, found.shared_accesses) == (1, 1, 1)
    with pytest.raises(ValueError, match="expected the function absent"):
        mix(sass, "absent")


def test_log_of_the_entry_alone():
    log = """ptxas info    : Compiling entry function 'a' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'b' for 'sm_80'
    64 bytes stack frame, 56 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 64 bytes cumulative stack size, 1024 bytes smem
"""
    a, b = usage(log, "a"), usage(log, "b")
    assert (a.registers, a.spill_store_bytes, a.static_shared_bytes, a.barriers) == (26, 0, 0, 0)
    assert (b.registers, b.spill_store_bytes, b.spill_load_bytes, b.stack_bytes) == (32, 56, 60, 64)
    assert (b.static_shared_bytes, b.barriers) == (1024, 1)
    with pytest.raises(ValueError, match="expected registers and spills of c"):
        usage(log, "c")
