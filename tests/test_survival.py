"""Sweeps that are killed, that run beside each other, and that meet implementations which crash or want all memory."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from harness import records
from harness.rows import ParityRow, SampleRow, SweepRow, columns, key
from tests.conftest import command, finish

KILLS, TIMINGS = 20, 9


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("grid") / "tiny.toml"
    path.write_text('[[block]]\ncases = ["size-d16"]\ninner_models = ["linear"]\ndtypes = ["fp32"]\n')
    return path


def arguments(grid: Path, folder: Path, *more: str) -> tuple[str | Path, ...]:
    names = "torch.eager,ours.slow,ours.wrong"
    chosen = ("--implementations", names) if "--implementations" not in more else ()
    return "sweep", "--device", "cpu", "--grid", grid, "--results", folder, *chosen, *more


def sweep(ours: Path, *given):
    return command(ours, *arguments(*given))


@pytest.fixture(scope="module")
def calm(ours, grid, tmp_path_factory) -> dict[tuple, str]:
    """The outcome of a sweep that nobody disturbs."""
    folder = tmp_path_factory.mktemp("calm")
    assert finish(sweep(ours, grid, folder))[0] == 1  # ours.wrong is
    return outcome(folder)


def outcome(folder: Path) -> dict[tuple, str]:
    rows = records.load(folder / "sweep.csv", SweepRow) + records.load(folder / "parity.csv", ParityRow)
    assert len({key(row) for row in rows}) == len(rows)
    return {key(row): row.status for row in rows}


def kill(process, path: Path, chance: random.Random) -> bool:
    """SIGKILL at a random moment, as often as not just while a row is written; False if it was done before that."""
    size = path.stat().st_size if path.exists() else 0
    until = time.monotonic() + chance.uniform(0, 5)
    on_growth = chance.random() < 0.5
    while process.poll() is None and time.monotonic() < until:
        if on_growth and path.exists() and path.stat().st_size != size:
            time.sleep(chance.uniform(0, 0.02))
            break
        time.sleep(0.001)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


@pytest.mark.timeout(600)
def test_a_sweep_killed_at_random_ends_with_the_rows_of_one_never_killed(ours, grid, calm, tmp_path):
    chance = random.Random(0)
    killed = kept = 0
    folder = tmp_path / "killed"
    while killed < KILLS:
        complete = kept == TIMINGS
        file = folder / chance.choice(["sweep.csv", "sweep.csv", "parity.csv", "samples.csv"])
        killed += (alive := kill(sweep(ours, grid, folder), file, chance))
        if (folder / "sweep.csv").exists():
            now = len(records.load(folder / "sweep.csv", SweepRow))
            assert now >= kept  # what was finished stays
            kept = now
        if not alive or complete:  # it was faster than the executioner, or had little to do: again from the start
            for path in folder.iterdir():
                path.unlink()
            kept = 0
    code, said = finish(sweep(ours, grid, folder))
    assert code == 1, said
    assert outcome(folder) == calm
    samples = records.samples(folder)
    timed = [row for row in records.load(folder / "sweep.csv", SweepRow) if row.status == "ok"]
    assert len(timed) == 6 and not (folder / "samples.csv").exists()
    of_rows = samples.groupby(["run_id", "implementation", "pass"]).size()
    assert all(of_rows[row.run_id, row.implementation, row.pass_] == row.samples for row in timed)


def test_two_sweeps_at_once_on_one_folder(ours, here, grid, calm, tmp_path):
    folder = tmp_path / "both"
    both = [sweep(ours, grid, folder) for _ in range(2)]
    for process in both:
        code, said = finish(process)
        assert code == 1 and "Traceback" not in said, said
    assert outcome(folder) == calm
    code, said = here(*arguments(grid, folder, "--status"))
    assert code == 0 and "9 timings, 0 to do" in said, said


def test_a_crash_costs_its_own_rows_and_retry_failed_is_for_them(here, grid, tmp_path, capsys):
    names = "--implementations", "torch.eager,ours.crash"
    code, said = here(*arguments(grid, tmp_path / "r", *names))
    rows = {(row.implementation, row.pass_): row for row in records.load(tmp_path / "r" / "sweep.csv", SweepRow)}
    assert code == 1 and len(rows) == 6, said
    assert all(row.status == "ok" for (name, _), row in rows.items() if name == "torch.eager")
    crashed = [row for (name, _), row in rows.items() if name == "ours.crash" and row.status == "crash"]
    assert crashed and all(row.reason.startswith("the process died with signal SIGABRT") for row in crashed)

    code, said = here(*arguments(grid, tmp_path / "r", *names))
    assert "6 timings, 0 to do" in said, said
    with pytest.raises(SystemExit, match="2"):
        here(*arguments(grid, tmp_path / "r", *names, "--retry", "failed", "--status"))
    assert "not allowed with" in capsys.readouterr().err
    code, said = here(*arguments(grid, tmp_path / "r", *names, "--retry", "failed"))
    assert f"6 timings, {len(crashed)} to do" in said, said


def test_what_runs_out_of_memory_is_measured_alone(ours, here, grid, tmp_path):
    common = "--device", "cpu", "--grid", grid, "--results", tmp_path
    for name in ("ours.greedy", "ours.hungry"):  # together one of them would find none
        assert finish(command(ours, "parity", *common, "--implementations", name))[0] == 0
    more = "--implementations", "ours.greedy,ours.hungry", "--processes", "2", "--passes", "forward"
    code, said = here(*arguments(grid, tmp_path, *more))
    rows = records.load(tmp_path / "sweep.csv", SweepRow)
    assert code == 0 and [(row.status, row.processes) for row in rows] == [("ok", 2)] * 2, said
    assert set(records.samples(tmp_path)["process"]) == {0, 1}


def test_samples_of_a_finished_sweep_and_of_a_journal(tmp_path):
    one = SampleRow(
        run_id="r1", implementation="torch.eager", inner_model="linear", case="a", pass_="forward",
        batch=1, tokens=64, heads=1, head_dim=64, mini_batch=16, causal=True, dtype="fp32",
        matmul_precision="ieee", cache="warm", device="cpu",
        process=0, block=0, device_ms=1.5, host_ms=2.5,
    )
    assert list(records.samples(tmp_path).columns) == list(columns(SampleRow)) and records.samples(tmp_path).empty
    records.append(tmp_path / "samples.csv", [one])
    records.pack_samples(tmp_path)
    assert not (tmp_path / "samples.csv").exists() and list(records.samples(tmp_path)["device_ms"]) == [1.5]
    from dataclasses import replace

    again = [replace(one, run_id="r2", device_ms=2.0)] * 2 + [replace(one, run_id="r2", process=1, device_ms=3.0)]
    records.append(tmp_path / "samples.csv", again)
    assert sorted(records.samples(tmp_path)["device_ms"]) == [1.5, 2.0, 2.0, 3.0]  # equal samples are samples
    records.pack_samples(tmp_path)
    assert sorted(records.samples(tmp_path)["device_ms"]) == [2.0, 2.0, 3.0]  # of the last run
    records.append(tmp_path / "samples.csv", again)  # as if killed before the journal was deleted
    assert sorted(records.samples(tmp_path)["device_ms"]) == [2.0, 2.0, 3.0]
    (tmp_path / "samples.parquet").write_bytes((tmp_path / "samples.parquet").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"samples.parquet: not a Parquet file that can be read"):
        records.samples(tmp_path)


def test_a_sweep_that_finds_nothing_to_time_leaves_the_working_directory_alone(ours, grid, tmp_path):
    before = sorted(path.name for path in ours.iterdir())
    assert finish(sweep(ours, grid, tmp_path / "folder", "--implementations", "ours.wrong"))[0] == 1
    assert {row.status for row in records.load(tmp_path / "folder" / "sweep.csv", SweepRow)} == {"wrong"}
    assert set(before) <= {path.name for path in ours.iterdir()}
