"""A worker process: what it returns, how it fails, and that the next call works all the same.

The functions that it runs are at the top of this file, where the child process can import them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.frameworks import Unsupported
from harness.worker import Failure, Worker, classify, stop_all
from tests.conftest import ROOT

# As the environment was while this module was imported: in the child, that is before the first call.
AT_IMPORT = os.environ.get("TTT_LAB_TEST")
TIMEOUT = 60.0


def add(x: int, y: int) -> int:
    return x + y


def process() -> int:
    return os.getpid()


def fail(kind: type[Exception], text: str) -> None:
    raise kind(text)


def leave(code: int, last_words: str = "") -> None:
    print(last_words, file=sys.stderr, flush=True)
    os._exit(code)


def interrupt_oneself() -> str:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    return "still here"


def kill_oneself(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(TIMEOUT)


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def seen_at_import() -> str | None:
    return AT_IMPORT


def make_a_lambda() -> object:
    return lambda: None


def chatter() -> str:
    print("on standard output", flush=True)
    return "done"


@pytest.fixture(scope="module")
def shared():
    worker = Worker()
    yield worker
    worker.close()


def failure(worker: Worker, function, *args, timeout: float = TIMEOUT) -> Failure:
    with pytest.raises(Failure) as caught:
        worker.call(function, *args, timeout=timeout)
    return caught.value


def test_a_call_returns_from_one_other_process(shared):
    assert shared.call(add, 2, 3, timeout=TIMEOUT) == 5
    pid = shared.call(process, timeout=TIMEOUT)
    assert pid == shared.call(process, timeout=TIMEOUT) != os.getpid()


@pytest.mark.parametrize(
    "kind, text, status, reason",
    [
        (ValueError, "xk: too short", "error", "ValueError: xk: too short"),
        (ValueError, "two\n  lines", "error", "ValueError: two lines"),
        (MemoryError, "", "oom", "out of memory: MemoryError"),
        (RuntimeError, "RESOURCE_EXHAUSTED: 40 GiB\nmore", "oom", "out of memory: RESOURCE_EXHAUSTED: 40 GiB"),
        (Unsupported, "PyTorch sees no CUDA device", "unsupported", "PyTorch sees no CUDA device"),
    ],
)
def test_an_exception_is_a_failure_and_the_process_lives_on(shared, kind, text, status, reason):
    pid = shared.call(process, timeout=TIMEOUT)
    found = failure(shared, fail, kind, text)
    assert (found.status, found.reason) == (status, reason)
    assert shared.call(process, timeout=TIMEOUT) == pid


def test_out_of_device_memory_is_known_by_its_name():
    kind = type("OutOfMemoryError", (RuntimeError,), {})
    assert classify(kind("CUDA out of memory")) == ("oom", "out of memory: CUDA out of memory")
    texts = "CUDA error: out of memory\nmore", "cudaErrorMemoryAllocation: no", "CUDA_ERROR_OUT_OF_MEMORY: no"
    for text in (*texts, "Triton Error [CUDA]: out of memory"):
        assert classify(RuntimeError(text)) == ("oom", f"out of memory: {text.splitlines()[0]}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_signal_is_a_crash_with_its_name_and_the_next_call_works(shared, number):
    found = failure(shared, kill_oneself, number)
    assert (found.status, found.reason) == ("crash", f"the process died with signal {number.name}")
    assert shared.call(add, 2, 3, timeout=TIMEOUT) == 5


def test_a_signal_without_a_name_is_a_crash_with_its_number(shared):
    number = signal.SIGRTMIN + 1
    assert failure(shared, kill_oneself, number).reason == f"the process died with signal {int(number)}"


def no_memory(*_, **__):
    raise OSError("no memory")


def reaped(*_):
    raise ChildProcessError("no child processes")


def test_a_child_that_somebody_else_reaped_is_a_crash(monkeypatch):
    worker = Worker()
    try:
        worker.call(add, 2, 3, timeout=TIMEOUT)
        monkeypatch.setattr(os, "waitpid", reaped)
        found = failure(worker, leave, 7, "Fatal")
        assert (found.status, found.reason) == ("crash", "the process hung up without an error code: Fatal")
        monkeypatch.undo()
        assert worker.call(add, 2, 3, timeout=TIMEOUT) == 5
    finally:
        worker.close()


def test_an_exit_is_a_crash_with_its_code_and_last_line(shared):
    found = failure(shared, leave, 7, "Fatal: illegal instruction\n\n")
    assert (found.status, found.reason) == ("crash", "the process died with exit code 7: Fatal: illegal instruction")
    assert failure(shared, kill_oneself, signal.SIGKILL).reason == "the process died with signal SIGKILL"
    assert shared.call(add, 2, 3, timeout=TIMEOUT) == 5


@pytest.mark.parametrize(("text", "starts_anew"), [("CUDA error: an illegal memory access", True), ("a typo", False)])
def test_after_an_error_of_the_device_the_next_call_has_a_process_of_its_own(shared, text, starts_anew):
    before = shared.call(process, timeout=TIMEOUT)
    assert failure(shared, fail, RuntimeError, text).reason == f"RuntimeError: {text}"
    assert (shared.call(process, timeout=TIMEOUT) != before) == starts_anew


def test_sys_exit_is_a_crash(shared):
    assert failure(shared, sys.exit, 3).status == "crash"
    assert shared.call(add, 2, 3, timeout=TIMEOUT) == 5


def test_a_result_that_cannot_be_sent_is_a_crash_that_says_so(shared):
    found = failure(shared, make_a_lambda)
    assert found.status == "crash" and "Can't pickle" in found.reason
    assert shared.call(add, 2, 3, timeout=TIMEOUT) == 5


def test_a_call_that_hangs_is_a_timeout_and_the_next_one_works(shared):
    pid = shared.call(process, timeout=TIMEOUT)
    start = time.monotonic()
    found = failure(shared, sleep, TIMEOUT, timeout=0.2)
    assert (found.status, found.reason) == ("timeout", "no result after 0.2 s")
    assert time.monotonic() - start < TIMEOUT / 2
    assert shared.call(process, timeout=TIMEOUT) != pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_ctrl_c_is_the_parents(shared):
    assert shared.call(interrupt_oneself, timeout=TIMEOUT) == "still here"


def test_ctrl_c_while_it_starts_is_the_parents_too():
    worker = Worker()
    try:
        worker._start()
        os.kill(worker._process.pid, signal.SIGINT)
        assert worker.call(add, 2, 3, timeout=TIMEOUT) == 5
    finally:
        worker.close()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_what_it_prints_stays_out_of_the_way(shared, capfd):
    assert shared.call(chatter, timeout=TIMEOUT) == "done"
    assert capfd.readouterr() == ("", "")


def test_environment_is_set_before_the_first_import():
    worker = Worker({"TTT_LAB_TEST": "early"})
    try:
        assert worker.call(seen_at_import, timeout=TIMEOUT) == "early"
    finally:
        worker.close()
    assert "TTT_LAB_TEST" not in os.environ


def test_a_closed_worker_starts_nothing():
    worker = Worker()
    worker.close()
    assert failure(worker, add, 2, 3).reason == "stopped by the user"


def test_what_did_not_start_is_nothing_to_stop_and_the_next_call_starts(monkeypatch):
    worker = Worker()
    try:
        monkeypatch.setattr(subprocess, "Popen", no_memory)
        with pytest.raises(OSError, match="no memory"):
            worker.call(add, 2, 3, timeout=TIMEOUT)
        worker.stop()
        monkeypatch.undo()
        assert worker.call(add, 2, 3, timeout=TIMEOUT) == 5
    finally:
        worker.close()


def test_a_child_does_not_outlive_its_parent_whatever_it_is_doing():
    start = "from tests.test_worker import *; w = Worker(); print(w.call(process, timeout=60), flush=True); "
    command = [sys.executable, "-c", start + "w.call(sleep, 60, timeout=60)"]
    parent = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGINT)
    assert parent.wait(TIMEOUT) != 0
    parent.stdout.close()
    for _ in range(100):
        if not Path("/proc", str(pid)).exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{pid} lives on")


def test_all_are_told_to_end_before_one_is_waited_for(monkeypatch):
    ends = []
    monkeypatch.setattr(Worker, "kill", lambda self: ends.append(("kill", self)))
    monkeypatch.setattr(Worker, "stop", lambda self: ends.append(("stop", self)))
    workers = Worker(), Worker()
    stop_all(iter(workers))
    assert ends == [("kill", workers[0]), ("kill", workers[1]), ("stop", workers[0]), ("stop", workers[1])]


def test_what_was_told_to_end_starts_again_when_it_is_called():
    worker = Worker()
    try:
        first = worker.call(process, timeout=TIMEOUT)
        stop_all([worker])
        assert not worker.running and worker.call(process, timeout=TIMEOUT) != first
    finally:
        worker.close()
