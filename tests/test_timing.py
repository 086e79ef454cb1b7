"""Clocks and what is timed: windows of CUPTI's records, calls per block, cold sets, what the host's time bounds."""

from __future__ import annotations

import math
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from harness import ceilings, device_clock, environment, gpu_state, grid, jobs, sweep
from harness.device_clock import CuptiClock, HostClock, Times, open_clock
from harness.frameworks import Unsupported, open_framework
from harness.parity import Settings
from harness.rows import SampleRow
from harness.timing import Block, Ready, Stand, Subject
from harness.worker import Failure
from implementations.registry import Implementation, implementations
from spec.cases import CASES, draw
from spec.cost import bytes_min, flops
from tests.test_records import sweep_row

CASE = CASES["size-d16"]
PROBLEM = CASE.problem("linear", "fp32", "ieee")


class FakeCupti(types.ModuleType):
    """CUPTI on a device that the test plays: `launch` leaves a record, `flush` hands the records over."""

    ActivityKind = types.SimpleNamespace(CONCURRENT_KERNEL=10, MEMCPY=1, MEMSET=2)

    def __init__(self):
        super().__init__("cupti.cupti")
        self.now, self.enabled, self.records = 0, set(), []

    def activity_register_callbacks(self, requested, completed):
        assert requested()[0] > 0
        self.completed = completed

    def activity_enable(self, kind):
        self.enabled.add(kind)

    def activity_disable(self, kind):
        self.enabled.remove(kind)

    def activity_flush_all(self, forced):
        assert forced
        records, self.records = self.records, []
        self.completed(records)

    def get_timestamp(self):
        return self.now

    def launch(self, after_ns, for_ns, name="_Z6kernelPf", kind=10):
        self.now += after_ns
        record = types.SimpleNamespace(kind=kind, start=self.now, end=self.now + for_ns)
        if kind == 10:
            record.name = name
        if kind in self.enabled:
            self.records.append(record)
        self.now += for_ns


class FakeFramework:
    name, device = "jax", "cuda"

    def __init__(self, cupti):
        self.cupti = cupti

    def synchronize(self, result):
        self.cupti.now += 500

    def touch(self):
        self.cupti.launch(10, 10)

    def hold(self, seconds):
        self.cupti.launch(10, int(seconds * 1e9), "_ZN2at4cuda12_GLOBAL__N_111spin_kernelEl")
        return lambda: True


@pytest.fixture
def cupti(monkeypatch):
    fake = FakeCupti()
    package = types.ModuleType("cupti")
    package.cupti = fake
    monkeypatch.setitem(sys.modules, "cupti", package)
    monkeypatch.setitem(sys.modules, "cupti.cupti", fake)
    device_clock._recorder.cache_clear()
    yield fake
    device_clock._recorder.cache_clear()


def test_a_call_takes_from_its_first_kernels_start_to_its_last_ones_end(cupti):
    def call():
        cupti.now += 9_000_000  # the host is busy: no part of it
        cupti.launch(10, 2_000_000)
        cupti.launch(500_000, 1_000_000, "_ZN2at6native4fillIfLi4EEEvPf")  # the gap between is
        cupti.launch(0, 250_000, kind=1)

    clock = open_clock(FakeFramework(cupti))
    times = clock.time([call, lambda: cupti.launch(10, 1_000_000), call])
    assert clock.name == "cupti" and times.ms == [3.75, 1.0, 3.75] and times.launches == 3
    assert times.kernels == "1 x kernel; 1 x at::native::fill; 1 x copy"
    assert not cupti.enabled


def test_a_kernel_outside_every_call_and_a_call_without_one_are_errors(cupti):
    clock = CuptiClock(FakeFramework(cupti))

    def late():
        cupti.launch(10, 10)
        cupti.records.append(types.SimpleNamespace(kind=10, start=cupti.now + 5, end=cupti.now + 10**9, name="late"))

    with pytest.raises(RuntimeError, match="late ran .* us outside the call that was timed"):
        clock.time([late])
    with pytest.raises(RuntimeError, match="a call ran nothing on the device"):
        clock.time([lambda: cupti.launch(1, 1), lambda: None])


def test_a_record_belongs_to_its_call_though_the_devices_clock_is_off(cupti):
    clock = CuptiClock(FakeFramework(cupti))

    def ahead(ns):
        def call():
            cupti.launch(10, 1_000_000)
            cupti.records[-1].start += ns
            cupti.records[-1].end += ns

        return call

    assert clock.time([ahead(0), ahead(800_000), ahead(-1_500_000)]).ms == [1.0, 1.0, 1.0]


def test_cupti_that_does_not_start_at_once_is_asked_again(cupti, monkeypatch):
    register, refused = cupti.activity_register_callbacks, []

    def refuse_once(*callbacks):
        if not refused:
            refused.append(callbacks)
            raise RuntimeError("ERROR_NOT_INITIALIZED (15)")
        register(*callbacks)

    monkeypatch.setattr(cupti, "activity_register_callbacks", refuse_once)
    monkeypatch.setattr(device_clock, "START_WAIT_S", 0.0)
    assert open_clock(FakeFramework(cupti)).name == "cupti" and refused

    monkeypatch.setattr(cupti, "activity_enable", lambda kind: refused.append(kind) or 1 / 0)
    with pytest.raises(RuntimeError, match="CUPTI: division"):  # another error is told at once
        CuptiClock(FakeFramework(cupti))
    assert len(refused) == 2


def test_without_cupti_the_next_best_clock_says_so(cupti, monkeypatch):
    monkeypatch.setattr(cupti, "activity_enable", lambda kind: None)  # it takes the call and records nothing
    assert open_clock(FakeFramework(cupti)).name == "host_sync"
    device_clock._recorder.cache_clear()
    monkeypatch.setitem(sys.modules, "cupti", None)
    assert open_clock(FakeFramework(cupti)).name == "host_sync"
    assert open_clock(open_framework("torch", "cpu")).name == "host_sync"


def test_the_hosts_clock_waits_for_the_result():
    framework = open_framework("jax", "cpu")
    clock = HostClock(framework)
    assert all(ms >= 20 for ms in clock.time([lambda: time.sleep(0.02)] * 2).ms)


@pytest.mark.parametrize("key", ["torch.eager", "jax.scan"])
def test_a_stand_times_every_pass_in_any_order(key):
    entry = implementations()[key]
    stand = Stand(Subject(entry, CASE, PROBLEM, 0, "cpu"), open_framework(entry.framework, "cpu"), draw(CASE, PROBLEM))
    forward = stand.ready("forward")
    both = stand.ready("forward_backward")
    backward = stand.ready("backward")
    assert math.isclose(both.first_call_s, forward.first_call_s + backward.first_call_s)
    for pass_ in ("forward", "backward", "forward_backward"):
        block = stand.block(pass_, "warm", 3)
        assert len(block.device.ms) == len(block.host_ms) == 3 and min(block.device.ms) > 0
    with pytest.raises(Unsupported, match="too small to be measured cold|CPU"):
        stand.block("forward", "cold", 1)


def test_cold_calls_rotate_over_more_than_three_times_the_l2_cache(monkeypatch):
    entry, framework = implementations()["torch.eager"], open_framework("torch", "cpu")
    one_set = sum(x.nbytes for x in draw(CASE, PROBLEM)[0])
    monkeypatch.setattr(framework, "l2_bytes", lambda: 2 * one_set)
    stand = Stand(replace_device(Subject(entry, CASE, PROBLEM, 0, "cpu")), framework, draw(CASE, PROBLEM))
    seen = []
    monkeypatch.setattr(stand, "_page", types.SimpleNamespace(forward=lambda given, problem: seen.append(id(given))))
    stand.ready("forward")
    seen.clear()
    stand.block("forward", "cold", 12)
    assert len(set(seen)) == 6 and all(len(set(seen[i : i + 6])) == 6 for i in range(len(seen) - 6))
    seen.clear()
    stand.block("forward", "warm", 12)
    assert len(set(seen)) == 1


def replace_device(subject):
    """A CPU's inputs for what believes that it is on a GPU."""
    return replace(subject, device="cuda")


def test_one_stand_a_process_the_last_subjects():
    entry = implementations()["torch.eager"]
    one, other = (Subject(entry, CASE, PROBLEM, seed, "cpu") for seed in (0, 1))
    jobs.ready(one, "forward")
    stand = jobs._stand
    jobs.block(one, "forward", "warm", 1)
    assert jobs._stand is stand
    jobs.block(other, "backward", "warm", 1)  # as after a crash: nobody asked for it to be ready
    assert jobs._stand is not stand and jobs._stand.subject == other
    jobs.clear()
    assert jobs._stand is None


class Cell:
    """What `sweep._result` looks at of a subject of measurement."""

    failure, refused = None, {}

    def __init__(self, blocks):
        self.blocks, self.ready = {"cold": blocks}, [Ready(1.5, 2.0, "cupti", Times([1.0], 7, "7 x k"), 100)]


BLANK = replace(sweep_row(), status="error", reason="not measured", device_ms=None, roofline_ms=0.5)


def state(clock, *throttles):
    return gpu_state.GpuState(clock, 300.0, throttles)


def test_a_row_is_the_median_of_all_blocks_and_keeps_every_sample():
    blocks = [
        (0, 0, Block(Times([1.0, 2.0], 7, "7 x k"), [3.0, 3.0], state(1980.0))),
        (1, 0, Block(Times([3.0], 7, "7 x k"), [4.0], state(1200.0, "power cap"))),
    ]
    row, samples = sweep._result(Cell(blocks), BLANK, None, "cold")
    assert (row.status, row.device_ms, row.host_ms, row.timer, row.samples) == ("ok", 2.0, 3.0, "cupti", 3)
    assert (row.launches, row.kernels, row.processes, row.roofline_fraction) == (7, "7 x k", 2, 0.25)
    assert row.first_call_s == 1.5 and sweep._result(Cell(blocks), BLANK, 9.0, "cold")[0].first_call_s == 9.0
    assert (row.throttled, row.throttle_reasons, row.sm_clock_mhz) == (True, "power cap", 1590.0)
    assert [(s.process, s.device_ms, s.host_ms) for s in samples] == [(0, 1.0, 3.0), (0, 2.0, 3.0), (1, 3.0, 4.0)]
    assert all(isinstance(s, SampleRow) and s.cache == "cold" for s in samples)


def test_recording_that_is_in_the_way_gives_way_to_the_hosts_clock(cupti):
    def call():
        cupti.launch(1000, 2_000_000)

    framework = FakeFramework(cupti)
    clock, trial = device_clock.clock_for(framework, call, host_ms=2.1)
    assert (clock.name, trial.ms, trial.launches) == ("cupti", [2.0], 1)
    clock, trial = device_clock.clock_for(framework, call, host_ms=1.5)
    assert (clock.name, trial.ms, trial.kernels) == ("host_sync", [2.0], "1 x kernel")
    clock, trial = device_clock.clock_for(framework, lambda: time.sleep(0.01), host_ms=10.0)  # nothing CUPTI can see
    assert clock.name == "host_sync" and trial.ms[0] >= 10 and trial.launches is None


def test_a_call_is_held_back_until_its_launches_are_there_and_the_wait_is_no_part_of_it(cupti):
    clock, trial = device_clock.clock_for(FakeFramework(cupti), lambda: cupti.launch(1000, 2_000_000), host_ms=2.5)
    assert (trial.ms, trial.launches, trial.kernels) == ([2.0], 1, "1 x kernel")
    before = cupti.now
    assert clock.time([lambda: cupti.launch(1000, 1_000_000)]).ms == [1.0]
    assert cupti.now - before >= device_clock.LEAD * 2_500_000  # nanoseconds: the host's time of a call, and more
    assert device_clock._Lead(FakeFramework(cupti), 1000.0).seconds == device_clock.MOST_LEAD_MS / 1e3


def test_calls_of_which_one_was_launched_late_are_made_again_behind_a_longer_lead(cupti, monkeypatch):
    leads, made = [], []

    def hold(self, seconds):
        leads.append(seconds)
        return lambda: seconds >= 0.005 or len(leads) != 2  # the host is slow once

    monkeypatch.setattr(FakeFramework, "hold", hold)
    clock = CuptiClock(FakeFramework(cupti), host_ms=0.75)

    def call(number):
        made.append(number)
        cupti.launch(10, 1_000_000 * (number + 1) + 7 * made.count(number))

    times = clock.time([lambda number=number: call(number) for number in range(3)])
    assert leads == pytest.approx([0.0015] * 3 + [0.003] * 3) and made == [0, 1, 2] * 2
    assert times.ms == [1.000014, 2.000014, 3.000014]

    monkeypatch.setattr(FakeFramework, "hold", lambda self, seconds: leads.append(seconds) or (lambda: False))
    leads.clear()
    clock.time([lambda: call(0)])
    assert leads == pytest.approx([0.003, 0.006, 0.012, 0.02])  # and no longer: the last one counts


def test_every_process_takes_the_clock_of_the_first(cupti):
    framework = open_framework("torch", "cpu")
    assert [device_clock.clock_named(name, framework).name for name in ("host_sync",)] == ["host_sync"]
    assert device_clock.clock_named("cupti", FakeFramework(cupti)).name == "cupti"


@pytest.mark.parametrize(
    ("call_ms", "launches", "calls", "rounds"),
    [(1.0, 1, 20, 3), (5.0, 1, 4, 3), (1.0, 1000, 3, 2), (900.0, 9999, 1, 1)],
)
def test_blocks_are_short_and_of_few_launches(call_ms, launches, calls, rounds):
    class Recorder(Cell):
        asked: ClassVar[list] = []

        def call(self, process, job, pass_, cache, count):
            self.asked.append(count)

    subject = Recorder([])
    subject.workers = [None] * 2
    subject.asked.clear()
    subject.ready = [Ready(1.0, call_ms, "cupti", Times([1.0], launches, ""), None)]
    for round_ in range(sweep.ROUNDS[1]):
        sweep._block(subject, 0, round_, "forward", "cold")
    assert set(subject.asked) == {calls}
    assert len(subject.asked) == rounds


def test_what_may_tune_itself_gets_ready_with_nothing_beside_it():
    ours = Implementation("torch.ours", "torch", {"linear": "implementations.torch.ttt_linear"})
    theirs = Implementation("mine.fast", "torch", {"linear": "my_package.ttt_linear"})
    at_work, seen = [], []
    together = threading.Barrier(4)

    class Recorder(Cell):
        def place(self, process, pass_):
            at_work.append(self.cell.entry.key)
            if self.cell.entry is ours:
                together.wait(10)
            seen.append(sorted(at_work))
            time.sleep(0.01)
            at_work.remove(self.cell.entry.key)

        def get_ready(self, *arguments):
            self.failure = Failure("error", "not timed here")

        def call(self, *arguments):
            pass

    subjects = [Recorder([]) for _ in range(4)]
    for subject, entry in zip(subjects, (ours, theirs, ours, theirs), strict=True):
        subject.cell = grid.Cell(entry, CASE, PROBLEM, ("forward",))
    bench = sweep.Bench(sweep.Protocol(2, ("warm",)), Settings(environment.stamp("cpu", "test")))
    bench._take_turns(subjects, "forward")
    bench.close()
    assert [keys for keys in seen if "mine.fast" in keys] == [["mine.fast"]] * 4


@pytest.mark.parametrize(
    ("device", "page", "passes", "left"),
    [
        ("cuda", "my_package.ttt_linear", ("forward",), ["kernel.cubin"]),
        ("cuda", "my_package.ttt_linear", (), ["kernel.autotune.json", "kernel.cubin"]),
        ("cuda", "implementations.torch.ttt_linear", ("forward",), ["kernel.autotune.json", "kernel.cubin"]),
        ("cpu", "my_package.ttt_linear", ("forward",), ["kernel.autotune.json", "kernel.cubin"]),
    ],
)
def test_what_may_tune_itself_tunes_for_each_problem_anew(device, page, passes, left, tmp_path):
    class Tuned:
        running = True

        def __init__(self, environment):
            self.stopped, self.folder = 0, Path(environment["TRITON_CACHE_DIR"])

        def kill(self):
            self.stopped += 1

        def stop(self):
            pass

        close = stop

        def call(self, *arguments, **options):
            raise Failure("error", "not timed here")

    made = []
    settings = Settings(replace(environment.stamp("cpu", "test"), device=device), compiled=tmp_path)
    entry = Implementation("mine.fast", "torch", {"linear": page})
    bench = sweep.Bench(sweep.Protocol(2, ("warm",)), settings, lambda named: made.append(Tuned(named)) or made[-1])
    cell = grid.Cell(entry, CASE, PROBLEM, passes)
    bench._subject(cell)  # as a problem before this one, or a check, left it
    (made[0].folder / "HASH").mkdir(parents=True)
    for name in ("kernel.cubin", "kernel.autotune.json"):
        (made[0].folder / "HASH" / name).touch()
    assert [pass_ for _, pass_ in bench.measure([cell], None)] == list(passes)
    assert sorted(path.name for path in tmp_path.rglob("kernel.*")) == left
    assert [worker.stopped for worker in made] == [len(left) == 1] * 2  # what a process remembers goes with it
    bench.close()


def test_a_failure_has_no_time():
    cell = Cell([(0, 0, Block(Times([1.0]), [1.0], None))])
    cell.failure = Failure("oom", "80 GiB")
    row, samples = sweep._result(cell, BLANK, 9.0, "cold")
    assert (row.status, row.reason, row.device_ms, samples) == ("oom", "80 GiB", None, [])


def test_the_roofline_is_the_larger_of_bytes_and_flops_and_the_chain_a_floor_of_its_own(tmp_path):
    limits = ceilings.Ceilings(1e12, {"fp32": 1e9, "tf32": 1e30}, {"linear-16": 2.0}, "f")
    assert ceilings.roofline_ms(limits, PROBLEM, "forward") == pytest.approx(flops(PROBLEM, "forward") / 1e6)
    quick = replace(PROBLEM, matmul_precision="tf32")
    assert ceilings.roofline_ms(limits, quick, "backward") == pytest.approx(bytes_min(PROBLEM, "backward") / 1e9)
    assert ceilings.latency_floor_ms(limits, PROBLEM, "forward") == pytest.approx(PROBLEM.mini_batches * 2e-3)
    assert ceilings.latency_floor_ms(limits, PROBLEM, "forward_backward") == pytest.approx(PROBLEM.mini_batches * 4e-3)
    assert ceilings.roofline_ms(None, PROBLEM, "forward") is None
    assert ceilings.latency_floor_ms(limits, CASE.problem("mlp", "fp32", "ieee"), "forward") is None
    ceilings.save(limits, tmp_path)
    assert ceilings.load(tmp_path) == limits and ceilings.load(tmp_path / "none") is None
    (tmp_path / ceilings.FILE).write_text('{"speed": 3}')
    with pytest.raises(ValueError, match=r"ceilings.json: not the ceilings of a device"):
        ceilings.load(tmp_path)


def test_without_nvml_the_state_is_not_known(monkeypatch):
    gpu_state._nvml.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_state.read() is None
    gpu_state._nvml.cache_clear()
