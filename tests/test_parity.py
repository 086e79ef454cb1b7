"""What parity runs on: numbers handed over in files, copies that nobody changes later, groups, room and processes."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

import pytest
import torch

from harness import environment, jobs, parity, sweep
from harness.check import TensorCheck
from harness.frameworks import open_framework
from harness.grid import Cell
from harness.parity import Settings
from harness.worker import Failure, Unguarded
from implementations.registry import implementations
from spec.cases import CASES, draw
from spec.cost import working_bytes
from spec.problem import DTYPES
from tests.test_records import parity_row

CASE = CASES["size-d16"]
ENTRY = implementations()["torch.eager"]
SETTINGS = Settings(environment.stamp("cpu", "test"), jobs=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_handed_over_bit_for_bit(tmp_path, dtype):
    problem = CASE.problem("mlp", dtype)
    for tensors in (jobs.save_drawn(CASE, problem, 3, tmp_path), jobs.load_drawn(problem, tmp_path)):
        for given, loaded in zip(draw(CASE, problem, 3), tensors, strict=True):
            assert type(given) is type(loaded)
            assert all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(given, loaded, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_copies_have_the_bits_of_the_arrays_and_stay_as_they_were(name, dtype):
    inputs, _ = draw(CASE, CASE.problem("linear", dtype))
    framework = open_framework(name, "cpu")
    arrays = framework.arrays(inputs, strided=True)
    copies = framework.copies(arrays)
    for x, y in zip(inputs, copies, strict=True):
        assert y.is_contiguous() and x.tobytes() == y.view(torch.uint8).numpy().tobytes()
    if name == "torch":
        arrays.xq.zero_()
        assert copies.xq.view(torch.uint8).numpy().tobytes() == inputs.xq.tobytes()


def cells_of(*names: str) -> list[list[Cell]]:
    return [[Cell(ENTRY, CASES[name], CASES[name].problem("linear", "fp32"), ())] for name in names]


class Calls:
    """In place of a worker process: says how many calls were at work at once, and what they used."""

    def __init__(self, seconds, fails=()):
        self.seconds, self.fails = seconds, list(fails)
        self.at_once, self.most, self.lock, self.stopped = 0, 0, threading.Lock(), 0

    def call(self, function, *arguments, timeout):
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(self.seconds)
        with self.lock:
            self.at_once -= 1
        if self.fails:
            raise self.fails.pop()
        return None if function is jobs.save_truth else [TensorCheck("out", 0.0, 0.0, (0,), 1.0)]

    def kill(self):
        pass

    def stop(self):
        self.stopped += 1

    def close(self):
        pass


def test_a_group_is_yielded_when_it_is_done_and_no_file_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "_memory", lambda: tmp_path)
    names = ["size-d16", "stress-tiny", "stress-large", "stress-strided"]

    class Slow(Calls):
        def call(self, function, case, *arguments, timeout):
            self.seconds = 1.0 if "size-d16" in str((case, arguments)) else 0.0
            return super().call(function, case, *arguments, timeout=timeout)

    monkeypatch.setattr(parity, "Worker", lambda environment: Slow(0))
    monkeypatch.setitem(parity._PROCESSES_OF_SLOW, "cpu", 2)
    found = [cell.case.name for cell, _ in parity.run(cells_of(*names), SETTINGS)]
    assert sorted(found) == sorted(names) and found[-1] == "size-d16"
    assert not list(tmp_path.iterdir())


def test_a_cell_is_yielded_before_its_group_is_done(monkeypatch):
    class Slow(Calls):
        def call(self, function, *arguments, timeout):
            self.seconds = 1.0 if "torch.autograd" in str(arguments) else 0.0
            return super().call(function, *arguments, timeout=timeout)

    monkeypatch.setattr(parity, "Worker", lambda environment: Slow(0))
    entries = [implementations()[key] for key in ("torch.autograd", "jax.scan", "torch.eager")]
    group = [cell._replace(entry=entry) for (cell,) in cells_of("size-d16") for entry in entries]
    started, found = time.monotonic(), {}
    for cell, _ in parity.run([group], SETTINGS):
        found[cell.entry.key] = time.monotonic() - started
    assert len(found) == 3 and max(found["jax.scan"], found["torch.eager"]) < 0.8 <= found["torch.autograd"]


def test_what_takes_more_of_the_memory_has_less_beside_it():
    room, most, now, lock = parity._Room(4, 100), 0, 0, threading.Lock()

    def work(size):
        nonlocal most, now
        with room.taking(size):
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.05)
            with lock:
                now -= 1

    for size, at_once in ((0, 4), (40, 2), (60, 1), (1000, 1)):
        most = 0
        threads = [threading.Thread(target=work, args=(size,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == at_once and now == 0


def test_out_of_memory_is_tried_again_alone_on_a_gpu_only(monkeypatch):
    for device, tried in (("cpu", 1), ("cuda", 2)):
        stamp = environment.Stamp("run", device, "", "", "", "", "", "")
        runner = object.__new__(parity._Runner)
        runner.settings = Settings(stamp, jobs=2)
        runner._room = parity._Room(2, parity.DEVICE_BYTES)
        calls, idle = Calls(0, [Failure("oom", "80 GiB")]), Calls(0)
        runner._lanes = {"one": parity._Lane([calls], None), "another": parity._Lane([idle], None)}
        cell = Cell(ENTRY, CASE, CASE.problem("linear", "fp32"), ())
        found = runner._call(calls, cell, jobs.check)
        assert isinstance(found, Failure) == (tried == 1) and calls.stopped == idle.stopped == tried - 1


def test_a_script_that_cannot_be_imported_is_said_by_the_check_not_by_the_warm_up():
    worker = Calls(0, [Unguarded("put the calls under a guard")])
    lane = parity._Lane([worker], jobs.clear)
    try:
        assert lane.submit(lambda _: "checked").result(10) == "checked"
    finally:
        lane.cancel()


def test_the_memory_that_a_check_takes_is_known_roughly():
    problem = CASES["lm-1.3b"].problem("mlp", "bf16")
    assert 3.04e9 / 2 < working_bytes(problem) < 2 * 3.04e9  # measured: torch.eager, forward and backward, on an H100
    assert working_bytes(CASES["lm-1.3b-long"].problem("mlp", "bf16")) == 4 * working_bytes(problem)


def test_what_a_killed_run_left_in_memory_goes(monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "_MEMORY", tmp_path)
    monkeypatch.setattr(parity, "_ROOM_BYTES", 1)
    gone, kept = tmp_path / "ttt-lab-truth-99999999-a", tmp_path / f"ttt-lab-truth-{os.getpid()}-a"
    for folder in (gone, kept):
        (folder / "in it").mkdir(parents=True)
    assert parity._memory() == tmp_path and not gone.exists() and kept.exists()
    monkeypatch.setattr(parity, "_ROOM_BYTES", 2**70)
    assert parity._memory() is None
    monkeypatch.setattr(parity, "_MEMORY", tmp_path / "none")
    assert parity._memory() is None


def test_a_first_call_is_that_of_the_check(tmp_path):
    rows = [parity_row(tensor="out", first_call_s=2.0), parity_row(tensor="d_xq", first_call_s=3.0)]
    assert [sweep._first_call_s(rows, name) for name in ("forward", "backward", "forward_backward")] == [2.0, 3.0, 5.0]
    assert sweep._first_call_s(rows[:1], "backward") is None and sweep._first_call_s([], "forward") is None


def test_compilers_keep_what_they_made_in_the_folder_of_the_run(tmp_path):
    caches = parity.compiler_caches(tmp_path)
    assert all(value == "0" or value.startswith(str(tmp_path)) for value in caches.values()) and len(caches) == 5


def test_a_yardstick_on_disk_is_not_computed_again():
    problem = CASE.problem("linear", "fp32")
    cell = Cell(implementations()["torch.autograd"], CASE, problem, ())
    (group,) = parity.with_yardstick([cell])
    rows = {found.entry.key: rows for found, rows in parity.run([group], SETTINGS)}
    known = sweep.known_yardsticks([cell], rows["torch.eager"], SETTINGS)
    (alone,) = parity.with_yardstick([cell], known)
    assert len(group) == 2 and alone == [cell]
    ((_, again),) = parity.run([alone], SETTINGS, known)
    assert [(row.tensor, row.error_ratio, row.yardstick_rms_error) for row in again] == [
        (row.tensor, row.error_ratio, row.yardstick_rms_error) for row in rows["torch.autograd"]
    ]
    wrong = [replace(row, status="wrong", reason="is") for row in rows["torch.eager"]]
    for useless in (wrong, [replace(row, source_hash="0") for row in rows["torch.eager"]], rows["torch.autograd"]):
        assert not sweep.known_yardsticks([cell], useless, SETTINGS)
