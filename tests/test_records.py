"""Result files: round trips, torn lines, foreign headers, the last row of a cell, atomic replacement."""

import logging
import os
import threading
from dataclasses import FrozenInstanceError, replace

import pytest

from harness import records
from harness.rows import ParityRow, SampleRow, SweepRow, columns, latest

SIZES = {"batch": 2, "tokens": 64, "heads": 3, "head_dim": 64, "mini_batch": 16, "causal": True}
WHO = {"run_id": "r1", "implementation": "torch.eager", "inner_model": "linear", "case": "lm-125m-small", **SIZES}
WHENCE = {"git_sha": "abc", "source_hash": "def", "versions": "torch=2", "started_at": "2026-01-01T00:00:00Z"}
WHENCE["fingerprint"] = "0123456789ab"
SCHEMA = {  # as in docs: the order of the columns, written out once more on purpose
    ParityRow: "run_id implementation inner_model case batch tokens heads head_dim mini_batch causal dtype "
    "matmul_precision seed tensor status reason max_error rms_error yardstick_max_error yardstick_rms_error "
    "error_ratio worst_index device truth diverging_mini_batch source_hash git_sha versions started_at fingerprint "
    "first_call_s",
    SweepRow: "run_id implementation inner_model case pass batch tokens heads head_dim mini_batch causal dtype "
    "matmul_precision status reason cache device_ms device_ms_p20 device_ms_p80 host_ms first_call_s samples timer "
    "peak_memory_bytes flops bytes_min roofline_ms roofline_fraction launches error_ratio gpu driver cuda "
    "sm_clock_mhz throttled git_sha source_hash versions started_at device power_w throttle_reasons processes "
    "latency_floor_ms kernels fingerprint",
    SampleRow: "run_id implementation inner_model case pass batch tokens heads head_dim mini_batch causal dtype "
    "matmul_precision cache device process block device_ms host_ms sm_clock_mhz",
}


def parity_row(**changes):
    values = {**WHO, **WHENCE, "dtype": "fp32", "matmul_precision": "ieee", "seed": 0, "tensor": "out", "status": "ok"}
    return ParityRow(**values | {"error_ratio": 0.5, "device": "cpu", "truth": "primal"} | changes)


def sweep_row(**changes):
    values = {**WHO, **WHENCE, "dtype": "fp32", "matmul_precision": "ieee", "pass_": "forward", "cache": "cold"}
    return SweepRow(**values | {"status": "ok", "device": "cpu", "device_ms": 1 / 3, "error_ratio": 0.5} | changes)


def failed(make, status="oom", **changes):
    times = {"device_ms": None} if make is sweep_row else {}
    return make(status=status, reason="40 GiB, asked for 80", error_ratio=None, **times, **changes)


@pytest.mark.parametrize("row_type", SCHEMA)
def test_columns_are_the_schema(row_type):
    assert columns(row_type) == tuple(SCHEMA[row_type].split())


@pytest.mark.parametrize(
    "row",
    [
        parity_row(max_error=1e-300, worst_index="(0, 3)", diverging_mini_batch=3),
        failed(parity_row, "unsupported"),
        sweep_row(throttled=False, samples=100, peak_memory_bytes=2**40, gpu='an "H100", 80 GB'),
        failed(sweep_row, causal=False),
    ],
)
def test_rows_come_back_as_they_went(tmp_path, row):
    records.append(tmp_path / "r.csv", [row])
    records.append(tmp_path / "r.csv", [row])
    assert records.load(tmp_path / "r.csv", type(row)) == [row, row]
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("make", "changes", "text"),
    [
        (parity_row, {"status": "passed"}, "status: expected one of ok, unsupported"),
        (parity_row, {"status": "wrong"}, "reason: expected one line for status wrong"),
        (parity_row, {"status": "error", "reason": "a\nb"}, "reason: expected one line, got 'a"),
        (parity_row, {"error_ratio": None}, "error_ratio: expected at most 1"),
        (parity_row, {"error_ratio": float("nan")}, "error_ratio: expected at most 1"),
        (sweep_row, {"error_ratio": 1.5}, "error_ratio: expected at most 1"),
        (sweep_row, {"device_ms": None}, "device_ms: expected a positive time"),
        (sweep_row, {"device_ms": float("nan")}, "device_ms: expected a positive time"),
        (sweep_row, {"status": "wrong", "reason": "d_xq"}, "device_ms: expected none for status wrong"),
        (sweep_row, {"pass_": "both"}, "pass: expected one of forward, backward"),
    ],
)
def test_rows_that_cannot_be(make, changes, text):
    with pytest.raises(ValueError, match=text):
        make(**changes)


@pytest.mark.parametrize("torn", ["r2,torch.ea", "r2,torch.eager,linear\n", "r2,\N{EURO SIGN}"])
def test_torn_last_line_is_dropped_and_said(tmp_path, caplog, torn):
    path = tmp_path / "parity.csv"
    records.append(path, [parity_row()])
    sound = path.read_bytes()
    path.write_bytes(sound + torn.encode()[: None if torn.endswith("\n") else -1])
    with caplog.at_level(logging.WARNING):
        assert records.load(path, ParityRow) == [parity_row()]
    assert path.read_bytes() == sound
    assert "parity.csv:3: dropped a torn last line" in caplog.text


def test_several_rows_are_one_write_below_one_header(tmp_path, monkeypatch):
    path, writes, write = tmp_path / "parity.csv", [], os.write
    monkeypatch.setattr(records.os, "write", lambda handle, data: writes.append(data) or write(handle, data))
    rows = [parity_row(seed=seed) for seed in range(3)]
    records.append(path, rows)
    records.append(path, [])
    records.append(path, rows[:2])
    assert len(writes) == 2 and path.read_bytes() == b"".join(writes)
    assert records.load(path, ParityRow) == [*rows, *rows[:2]]


def test_no_rows_make_no_file(tmp_path):
    records.append(tmp_path / "parity.csv", [])
    assert not list(tmp_path.iterdir())


def test_append_to_an_empty_file_writes_the_header(tmp_path):
    (tmp_path / "parity.csv").touch()
    records.append(tmp_path / "parity.csv", [parity_row()])
    assert records.load(tmp_path / "parity.csv", ParityRow) == [parity_row()]


def test_append_after_a_torn_header(tmp_path, caplog):
    path = tmp_path / "sweep.csv"
    path.write_text(",".join(columns(SweepRow)))  # whole but for its line break
    with caplog.at_level(logging.WARNING):
        records.append(path, [sweep_row(), sweep_row(batch=4)])
    assert [row.batch for row in records.load(path, SweepRow)] == [2, 4]
    assert "sweep.csv:1: dropped a torn last line" in caplog.text


def test_append_cuts_off_a_torn_line_and_keeps_the_rest(tmp_path, caplog):
    path = tmp_path / "parity.csv"
    records.append(path, [parity_row(), parity_row(seed=1)])
    sound = path.read_bytes()
    path.write_bytes(sound + b"r2,torch.eager,li")
    with caplog.at_level(logging.WARNING):
        records.append(path, [parity_row(seed=2), parity_row(seed=3)])
    assert path.read_bytes().startswith(sound)
    assert [row.seed for row in records.load(path, ParityRow)] == [0, 1, 2, 3]
    assert "parity.csv:4: dropped a torn last line (17 bytes)" in caplog.text


def test_append_after_a_torn_line(tmp_path):
    path = tmp_path / "parity.csv"
    path.write_text("run_id,implem")
    records.append(path, [parity_row()])
    path.write_bytes(path.read_bytes()[:-5])
    records.append(path, [parity_row(seed=1)])
    assert [row.seed for row in records.load(path, ParityRow)] == [1]


def test_malformed_line_in_the_middle_has_file_and_line(tmp_path):
    path = tmp_path / "parity.csv"
    records.append(path, [parity_row()])
    line = path.read_text().splitlines()[1]
    with path.open("a") as file:
        file.write(line.replace(",64,", ",sixty,", 1) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"parity.csv:3: tokens: expected int, got 'sixty'"):
        records.load(path, ParityRow)


def test_who_writes_in_a_folder_has_it_to_himself(tmp_path):
    path = tmp_path / "sweep.csv"
    another = threading.Thread(target=records.append, args=(path, [sweep_row()]))
    with records._locked(path):
        another.start()
        another.join(0.3)
        assert another.is_alive() and not path.exists()
    another.join(10)
    assert len(records.load(path, SweepRow)) == 1


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "no newline, not ours"])
def test_foreign_header_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "sweep.csv"
    path.write_text(text)
    for use in (lambda: records.load(path, SweepRow), lambda: records.append(path, [sweep_row()])):
        with pytest.raises(ValueError, match=r"sweep.csv: columns missing run_id.*expected run_id,.*found"):
            use()
    assert path.read_text() == text


def test_columns_of_a_newer_version_are_refused(tmp_path):
    path = tmp_path / "sweep.csv"
    records.append(path, [sweep_row()])
    header, line = path.read_text().splitlines()
    path.write_text(f"{header},energy_j\n{line},3.5\n")
    before, row = path.read_bytes(), [sweep_row()]
    uses = (lambda: records.append(path, row), lambda: records.load(path, SweepRow))
    for use in (*uses, lambda: records.rewrite(path, SweepRow, latest)):
        with pytest.raises(ValueError, match=r"sweep.csv: columns unknown energy_j: expected run_id,"):
            use()
    assert path.read_bytes() == before


def test_latest_keeps_the_last_row_of_a_cell(tmp_path):
    first, other, again = sweep_row(), sweep_row(cache="warm"), sweep_row(run_id="r2", device_ms=2.0)
    assert latest([first, other, again]) == [again, other]
    changed = [parity_row(**{name: value}) for name, value in (("tensor", "d_xq"), ("seed", 1), ("device", "cuda"))]
    assert len(latest([parity_row(), *changed, parity_row(truth="dual")])) == 4
    failed = parity_row(run_id="r0", tensor="", status="error", error_ratio=None, reason="illegal access")
    right = [parity_row(), parity_row(tensor="d_xq")]
    assert latest([failed, *right]) == right
    failed_now = replace(failed, run_id="r2")
    assert latest([*right, failed_now]) == [failed_now]
    for row in (first, other, again):
        records.append(tmp_path / "sweep.csv", [row])
    table = records.frame(tmp_path / "sweep.csv", SweepRow)
    assert list(table["device_ms"]) == [2.0, 1 / 3] and list(table["pass"]) == ["forward"] * 2


def test_rewrite_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "parity.csv"
    records.append(path, [parity_row()])
    records.rewrite(path, ParityRow, lambda rows: [replace(row, seed=seed) for row in rows for seed in range(3)])
    before = path.read_bytes()
    assert [row.seed for row in records.load(path, ParityRow)] == [0, 1, 2]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        records.rewrite(path, ParityRow, lambda rows: rows[:1])
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {path.name, records.LOCK}
    monkeypatch.undo()
    records.rewrite(path, ParityRow, lambda rows: [])
    assert not path.exists()


def test_short_write_is_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(records.os, "write", lambda handle, data: len(data) - 1)
    with pytest.raises(OSError, match="No space left on device.*parity.csv"):
        records.append(tmp_path / "parity.csv", [parity_row()])


def test_results_folder(tmp_path):
    assert records.results_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="results cannot be written there.*file"):
        records.results_folder(tmp_path / "file" / "cpu")


def test_rows_are_frozen():
    with pytest.raises(FrozenInstanceError):
        parity_row().seed = 1
