"""What the comparison of two static reports calls a failure, a warning, or nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness import static_rows
from harness.command import main
from harness.compare import Section
from harness.static_compare import LINES_SHOWN, differences, sections
from harness.static_rows import StaticRow

ROW = StaticRow(
    implementation="triton.best",
    inner_model="linear",
    kernel="forward",
    variant="*bf16 D=64",
    architecture="sm_90a",
    compiler="triton 3.9.0",
    status="ok",
    registers=128,
    spill_store_bytes=0,
    spill_load_bytes=0,
    stack_bytes=0,
    static_shared_bytes=0,
    dynamic_shared_bytes=32768,
    barriers=1,
    threads=128,
    tensor_memory_columns=0,
    occupancy_blocks=4,
    occupancy_limit="registers",
    instructions=500,
    tensor_instructions=16,
    tensor_opcodes="16 x HGMMA.64x64x16.F32.BF16",
    global_loads_16=0,
    global_loads_32=0,
    global_loads_64=0,
    global_loads_128=8,
    async_copies=0,
    shared_accesses=8,
    barrier_instructions=2,
    special_function=4,
    source_hash="a",
    git_sha="b",
)
BACKWARD = replace(ROW, kernel="backward")


@pytest.fixture
def compare(tmp_path):
    """The findings between two lists of rows; None for no report at all."""

    def compare(base, head):
        for name, rows in (("base", base), ("head", head)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "static.csv").unlink(missing_ok=True)
            if rows is not None:
                static_rows.write(tmp_path / name, rows)
        return [(found.severity, found.text) for found in differences(tmp_path / "base", tmp_path / "head")]

    return compare


def test_rows_survive_the_file(tmp_path):
    static_rows.write(tmp_path, [ROW, BACKWARD])
    static_rows.write(tmp_path, [ROW])  # replaces, never adds
    assert static_rows.load(tmp_path) == [ROW]
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_nothing_changed(compare, tmp_path):
    assert compare([ROW], [replace(ROW, git_sha="c", source_hash="d")]) == []
    (found,) = sections(tmp_path / "base", tmp_path / "head")
    assert found == Section("note", "Static kernel report", ["No kernel changed."])


@pytest.mark.parametrize(
    "severity, words, changed",
    [
        ("failure", "spills 0 → 64 bytes a thread, 0 declared", {"spill_store_bytes": 48, "spill_load_bytes": 64}),
        ("warning", "spills 0 → 64", {"spill_store_bytes": 64, "declared_spill_bytes": 64}),
        ("failure", "registers 128 → 168: blocks an SM 4 → 3", {"registers": 168, "occupancy_blocks": 3}),
        ("info", "registers 128 → 126, as many", {"registers": 126}),
        ("warning", "blocks an SM 4 → 3 (shared)", {"occupancy_blocks": 3, "occupancy_limit": "shared"}),
        ("info", "blocks an SM 4 → 5", {"occupancy_blocks": 5, "registers": 96}),
        ("failure", "16 x HGMMA.64x64x16.F32.BF16 → none", {"tensor_opcodes": "", "tensor_instructions": 0}),
        ("failure", "→ 64 x HMMA.16816.F32", {"tensor_opcodes": "64 x HMMA.16816.F32"}),
        ("info", "→ 2 x UTCHMMA", {"tensor_opcodes": "2 x UTCHMMA"}),
        ("warning", "stack 0 → 256", {"stack_bytes": 256}),
        ("failure", "ok → error: ptxas fatal", {"status": "error", "reason": "ptxas fatal"}),
        ("failure", "ok → unsupported: not installed", {"status": "unsupported", "reason": "not installed"}),
        ("info", "other compilers: triton 3.9.0 → triton 4.0.0", {"compiler": "triton 4.0.0"}),
    ],
)
def test_change(compare, severity, words, changed):
    ((found, text),) = compare([ROW], [replace(ROW, **changed)])
    assert found == severity and words in text
    assert "compiler" in changed or text.startswith("`triton.best linear forward *bf16 D=64 sm_90a`: ")


def test_more_threads_in_fewer_blocks_are_no_loss(compare):
    assert compare([ROW], [replace(ROW, threads=256, occupancy_blocks=2)]) == []


def test_spill_that_was_there(compare):
    spilling = replace(ROW, spill_store_bytes=64, spill_load_bytes=64)
    assert [severity for severity, _ in compare([spilling], [spilling])] == ["warning"]
    assert [severity for severity, _ in compare([spilling], [ROW])] == ["info"]


def test_vanished_kernel(compare, tmp_path):
    ((severity, text),) = compare([ROW, BACKWARD], [ROW])
    assert severity == "failure" and "backward" in text and "vanished" in text
    (found,) = sections(tmp_path / "base", tmp_path / "head")
    assert found.severity == "performance" and found.lines == [f"- ❌ {text}"]


def test_every_kernel_vanished(compare):
    assert [severity for severity, _ in compare([ROW, BACKWARD], [])] == ["failure", "failure"]
    assert compare([ROW], None) == [("failure", "head has no static report")]


def test_another_setting_in_place(compare):
    found = compare([ROW], [replace(ROW, variant="*bf16 D=128")])
    assert [severity for severity, _ in found] == ["warning", "info"]
    unbuilt = replace(ROW, variant="*bf16 D=128", status="error", reason="no")
    assert [severity for severity, _ in compare([ROW], [unbuilt])] == ["failure", "failure"]


def test_new_kernel(compare):
    ((severity, text),) = compare([ROW], [ROW, BACKWARD])
    assert severity == "info" and "new: 128 registers" in text
    ((severity, text),) = compare([ROW], [ROW, replace(BACKWARD, spill_store_bytes=8)])
    assert severity == "failure" and "new, spills 8" in text


def test_first_report(compare):
    assert compare(None, []) == [("info", "base has no static report: nothing to compare with")]
    severities = [severity for severity, _ in compare(None, [replace(ROW, status="error", reason="no")])]
    assert severities == ["failure", "info"]


def test_neither(compare, tmp_path):
    assert compare(None, None) == []
    assert not list(sections(tmp_path / "base", tmp_path / "head"))


def test_a_planted_spill_turns_the_whole_comparison_red(compare, tmp_path):
    command = ["compare", str(tmp_path / "base"), str(tmp_path / "head"), "--markdown", str(tmp_path / "c.md")]
    compare([ROW], [replace(ROW, registers=126)])
    assert main(command) == 0
    compare([ROW], [replace(ROW, spill_store_bytes=64)])
    assert main(command) == 11 and "spills 0 → 64 bytes a thread" in (tmp_path / "c.md").read_text()
    compare([ROW, BACKWARD], [ROW])
    assert main(command) == 11 and "vanished" in (tmp_path / "c.md").read_text()
    for name in ("base", "head"):  # as `results/`, beside other devices
        (tmp_path / f"{name}-all").mkdir()
        (tmp_path / name).rename(tmp_path / f"{name}-all" / "static")
    command[1:3] = [str(tmp_path / "base-all"), str(tmp_path / "head-all")]
    assert main(command) == 11


def test_worst_first_and_short(compare, tmp_path):
    many = [replace(ROW, kernel=f"kernel_{number}") for number in range(LINES_SHOWN + 5)]
    compare([*many, ROW], [replace(ROW, registers=120)])
    (found,) = sections(tmp_path / "base", tmp_path / "head")
    assert found.severity == "performance" and len(found.lines) == LINES_SHOWN + 2
    assert found.lines[LINES_SHOWN] == "- ... and 5 more of severity failure" and "registers" in found.lines[-1]


def test_foreign_file(compare, tmp_path):
    compare([ROW], [ROW])
    (tmp_path / "base" / "static.csv").write_text("implementation,kernel\na,b\n")
    with pytest.raises(ValueError, match=r"static\.csv: columns missing"):
        list(sections(tmp_path / "base", tmp_path / "head"))
