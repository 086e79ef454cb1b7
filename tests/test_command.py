"""The command line from end to end, on the smallest cells: exit codes, files, and what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import parity, records
from harness.command import main
from harness.rows import ParityRow, SweepRow
from spec.problem import INNER_MODELS, PASSES
from spec.tensors import INPUTS, OUTPUTS
from tests.conftest import command, finish

TINY = ["--cases", "size-d16", "--inner-models", "linear", "--dtypes", "fp32", "--device", "cpu"]


def test_parity_of_what_is_right_and_of_what_is_not_there(tmp_path, capsys):
    arguments = ["parity", "--cases", "size-d16", "--dtypes", "fp32", "--implementations", "torch.eager,peer.ttt_tk"]
    assert main([*arguments, "--device", "cpu", "--results", str(tmp_path)]) == 0
    rows = records.load(tmp_path / "parity.csv", ParityRow)
    right = {(row.inner_model, row.tensor) for row in rows if row.implementation == "torch.eager"}
    assert right == {
        (inner_model, tensor)
        for inner_model in INNER_MODELS
        for tensor in (*OUTPUTS[inner_model]._fields, *(f"d_{name}" for name in INPUTS[inner_model]._fields))
    }
    for row in rows:
        reason = {"linear": "has no linear inner model", "mlp": "has no fp32"}[row.inner_model]
        elsewhere = row.implementation == "peer.ttt_tk"
        assert (row.status, row.reason) == (("unsupported", reason) if elsewhere else ("ok", ""))
    assert {"parity.csv", "parity_matrix.png", "environment.json"} == {path.name for path in tmp_path.glob("[!.]*")}
    said = capsys.readouterr().out
    assert "has no" in said and "28/28" in said


def test_parity_that_checks_nothing_of_what_it_was_asked_for_fails_and_says_why(tmp_path, capsys):
    arguments = ["parity", *TINY, "--results", str(tmp_path), "--implementations"]
    assert main([*arguments, "peer.ttt_tk"]) == 1
    assert "nothing was checked of peer.ttt_tk: has no linear inner model" in capsys.readouterr().out
    assert main([*arguments, "peer.ttt_tk,torch.eager"]) == 0
    assert "nothing was checked of peer.ttt_tk" in capsys.readouterr().out


def test_parity_of_what_is_missing_leaves_out_what_has_rows(tmp_path, monkeypatch, capsys):
    arguments = ["parity", *TINY, "--results", str(tmp_path), "--missing"]
    groups, run = [], parity.run
    monkeypatch.setattr(parity, "run", lambda given, *others: groups.append(given) or run(given, *others))
    for key, checked in (("torch.autograd", [2]), ("torch.autograd,jax.scan", [1]), ("torch.autograd,jax.scan", [])):
        assert main([*arguments, "--implementations", key]) == 0
        assert [len(group) for group in groups[-1]] == checked
    assert "jax.scan" in capsys.readouterr().out.rpartition("implementation")[2]  # the last table has all of them
    rows = records.load(tmp_path / "parity.csv", ParityRow)
    assert {row.implementation for row in rows} == {"torch.eager", "torch.autograd", "jax.scan"} and len(rows) == 36


def test_parity_of_what_is_wrong_says_where(ours, tmp_path):
    code, said = finish(command(ours, "parity", *TINY, "--implementations", "ours.wrong", "--results", tmp_path))
    assert code == 1, said
    failures = [line for line in said.splitlines() if line.startswith("wrong: ")]
    assert len(failures) == 1, said
    assert failures[0].startswith("wrong: ours.wrong linear size-d16 fp32: out: max error ")
    assert failures[0].endswith("worst at (1, 40, 1, 3), diverges in mini-batch 2 of 0 to 3")
    rows = [row for row in records.load(tmp_path / "parity.csv", ParityRow) if row.implementation == "ours.wrong"]
    assert {row.tensor: row.status for row in rows if row.status != "ok"} == {"out": "wrong"} and len(rows) == 12
    wrong = next(row for row in rows if row.tensor == "out")
    assert (wrong.worst_index, wrong.diverging_mini_batch) == ("1 40 1 3", 2) and wrong.error_ratio > 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--implementations", "torch.eagre"], "unknown implementation 'torch.eagre' (did you mean torch.eager?)"),
        (["--cases", "size-d61"], "unknown case 'size-d61' (did you mean size-d16?)"),
        (["--dtypes", "fp8"], "unknown dtype 'fp8'"),
        (["--grid", "nothing"], "unknown grid 'nothing'"),
        (["--dtypes", "bf16", "--matmul-precisions", "tf32"], "none is left"),
    ],
)
@pytest.mark.parametrize("name", ["parity", "sweep"])
def test_a_mistake_in_the_command_is_one_line(tmp_path, capsys, name, arguments, message):
    assert main([name, *arguments, "--results", str(tmp_path / "results")]) == 2
    said = capsys.readouterr().out
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["parity", "sweep"])
def test_a_results_folder_that_cannot_be_is_one_line(tmp_path, capsys, name):
    (tmp_path / "results").write_text("a file in its place")
    assert main([name, *TINY, "--results", str(tmp_path / "results")]) == 2
    said = capsys.readouterr().out
    assert "results cannot be written there" in said and str(tmp_path / "results") in said and said.count("\n") == 1
    assert (tmp_path / "results").read_text() == "a file in its place"


@pytest.mark.parametrize("file", ["parity.csv", "sweep.csv"])
@pytest.mark.parametrize("name", ["parity", "sweep"])
def test_results_of_another_version_are_left_alone_before_any_work(tmp_path, capsys, name, file):
    (tmp_path / file).write_text("somebody,else\n1,2\n")
    assert main([name, *TINY, "--implementations", "torch.eager", "--results", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert f"{file}: columns missing run_id" in said and said.count("\n") == 1
    assert (tmp_path / file).read_text() == "somebody,else\n1,2\n"
    assert [path.name for path in tmp_path.glob("[!.]*")] == [file]


@pytest.mark.parametrize("text", ["1k", "64,", ""])
def test_a_size_that_is_no_integer(capsys, text):
    with pytest.raises(SystemExit, match="2"):
        main(["parity", "--tokens", text])
    assert f"--tokens: expected integers with commas between them, got {text!r}" in capsys.readouterr().err


def interrupt_after_a_row(process: subprocess.Popen, path: Path) -> tuple[int, str]:
    """Send Ctrl-C as a terminal does, to the children too, once `path` has a row."""
    until = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") > 1) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    return finish(process)


def test_a_sweep_interrupted_resumed_and_repeated(ours, here, tmp_path):
    path, grid = tmp_path / "sweep.csv", tmp_path / "tiny.toml"
    grid.write_text('[[block]]\ncases = ["size-d16"]\n')
    names = "torch.eager,ours.slow,ours.wrong"
    arguments = "sweep", "--grid", grid, *TINY, "--implementations", names, "--results", tmp_path

    code, said = interrupt_after_a_row(command(ours, *arguments), path)
    kept = records.load(path, SweepRow)
    assert code == 130 and "interrupted: every finished row is on disk" in said and "Traceback" not in said, said
    assert 1 <= len(kept) < 9

    code, said = finish(command(ours, *arguments))
    assert "wrong: ours.wrong linear size-d16 fp32: out: max error " in said, said
    rows = records.load(path, SweepRow)
    assert code == 1 and f"9 timings, {9 - len(kept)} to do" in said, said
    assert all(row in rows for row in kept) and len(rows) == 9
    check_sweep(rows)
    plots = {"parity_matrix.png", "error_vs_time.png", "speedup_linear_forward.png"}
    assert plots <= {each.name for each in tmp_path.iterdir()}

    before = [(tmp_path / name).read_bytes() for name in ("sweep.csv", "parity.csv")]
    code, said = here(*arguments)
    assert code == 1 and "9 timings, 0 to do" in said, said
    assert [(tmp_path / name).read_bytes() for name in ("sweep.csv", "parity.csv")] == before
    check_some_of_them_again(here, tmp_path, grid, rows)


def check_some_of_them_again(
    here: Callable[..., tuple[int, str]], folder: Path, grid: Path, rows: list[SweepRow]
) -> None:
    """What a command does not name is not judged, shown or forgotten; another seed is another check."""
    arguments = "sweep", "--grid", grid, *TINY, "--implementations", "torch.eager", "--results", folder
    arguments = *arguments, "--passes", "forward"
    code, said = here(*arguments)
    assert code == 0 and "1 timings, 0 to do" in said and "wrong" not in said and "fwd+bwd" not in said, said

    code, said = here(*arguments, "--fresh")
    assert code == 0 and "1 timings, 1 to do" in said, said
    again = records.load(folder / "sweep.csv", SweepRow)
    (forgotten,) = (row for row in rows if (row.implementation, row.pass_) == ("torch.eager", "forward"))
    assert again[:-1] == [row for row in rows if row != forgotten] and again[-1].run_id != forgotten.run_id
    checked = records.load(folder / "parity.csv", ParityRow)
    assert [row.implementation for row in checked].count("ours.wrong") == 12

    code, said = here(*arguments, "--seed", "1")
    assert code == 0 and "1 timings, 1 to do" in said, said
    assert len(records.load(folder / "sweep.csv", SweepRow)) == len(rows)
    assert {row.seed for row in records.load(folder / "parity.csv", ParityRow)} == {0, 1}
    code, said = here(*arguments, "--seed", "1")
    assert code == 0 and "1 timings, 0 to do" in said, said


def check_sweep(rows: list[SweepRow]) -> None:
    """What is right has times, what is wrong has none and says why."""
    times = {}
    for name in ("torch.eager", "ours.slow", "ours.wrong"):
        assert [row.pass_ for row in rows if row.implementation == name] == list(PASSES)
    for row in rows:
        if row.implementation == "ours.wrong":
            assert row.status == "wrong" and row.device_ms is None and row.host_ms is None and row.error_ratio > 1
            assert row.reason.startswith("out: max error ") and "mini-batch 2 of 0 to 3" in row.reason
        else:
            assert row.status == "ok" and 0 < row.device_ms_p20 <= row.device_ms <= row.device_ms_p80
            assert 0 < row.error_ratio <= 1 and row.flops > 0 and row.timer and row.samples >= 2
            times[row.implementation, row.pass_] = row.device_ms
    assert times["ours.slow", "forward"] >= 20 and times["ours.slow", "forward_backward"] >= 20


def test_a_sweep_that_has_no_time_for_all_times_what_it_has_checked(tmp_path):
    arguments = ["sweep", *TINY, "--implementations", "torch.eager,torch.autograd", "--passes", "forward"]
    arguments += ["--results", str(tmp_path)]
    assert main([*arguments, "--seconds", "0"]) == 0
    kept = records.load(tmp_path / "sweep.csv", SweepRow)
    assert [(row.implementation, row.status) for row in kept] == [("torch.eager", "ok")]
    assert main(arguments) == 0
    rows = records.load(tmp_path / "sweep.csv", SweepRow)
    assert {row.implementation: row.status for row in rows} == {"torch.eager": "ok", "torch.autograd": "ok"}
    assert kept[0] in rows


def test_a_sweep_whose_time_is_up_keeps_all_that_it_has_timed(tmp_path):
    arguments = [*TINY, "--implementations", "torch.eager,torch.autograd", "--results", str(tmp_path)]
    assert main(["parity", *arguments]) == 0
    assert main(["sweep", *arguments, "--seconds", "0"]) == 0
    rows = records.load(tmp_path / "sweep.csv", SweepRow)
    assert [(row.implementation, row.pass_) for row in rows] == [
        ("torch.eager", "forward"),
        ("torch.autograd", "forward"),
    ]
