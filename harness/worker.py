"""One child process for each implementation: its crash, its memory pool and its hang are its own.

The parent calls `Worker.call(function, ...)`; the child runs it and sends back what it returned or raised.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness.frameworks import Unsupported
from harness.rows import Status

# After an illegal access, say, nothing works on the device any more in that process.
_DEVICE_ERROR = re.compile(r"CUDA error|CUDA_ERROR|cudaError|CUDADriverError|CUDARuntimeError")
_NO_MEMORY = re.compile("RESOURCE_EXHAUSTED|MemoryAllocation|out[ _]of[ _]memory", re.IGNORECASE)


class Failure(Exception):
    """A call that gave no result: `status` as in a result row, and the reason in one line."""

    def __init__(self, status: Status, reason: str):
        super().__init__(reason)
        self.status: Status = status
        self.reason = " ".join(reason.split())[:300] or status


class Worker:
    """A child process that runs calls one after another; started when first needed, and anew after a crash."""

    def __init__(self, environment: Mapping[str, str] | None = None):
        """`environment` is set in the child before any framework is imported."""
        self._environment = dict(environment or {})
        self._process: Any = None
        self._connection: Connection | None = None
        self._stopped = False
        self._starting = threading.Lock()
        self._log = tempfile.NamedTemporaryFile(prefix="ttt-lab-worker-", suffix=".log")  # noqa: SIM115

    def call(self, function: Callable, *args: Any, timeout: float) -> Any:
        """`function(*args)` in the child, within `timeout` seconds.

        Raises:
            Failure: it raised, ran out of memory or time, or took the process with it.
        """
        with self._starting:
            if self._stopped:
                raise Failure("crash", "stopped by the user")
            if self._process is None:
                self._start()
            process, connection = self._process, self._connection
        assert connection is not None
        try:
            os.truncate(self._log.name, 0)  # a crash is to be explained by the last words of this call
            connection.send((function, args))
            if not connection.poll(timeout):
                self.stop()
                raise Failure("timeout", f"no result after {timeout:g} s")
            status, value = connection.recv()
        except (EOFError, OSError) as error:
            process.join(5)
            died, last = _end(process.exitcode), self._last_line()
            self.stop()
            raise Failure("crash", f"the process {died}{': ' + last if last else ''}") from error
        if status != "ok":
            if status in ("error", "oom") and _DEVICE_ERROR.search(value):
                self.stop()
            raise Failure(status, value)
        return value

    @property
    def running(self) -> bool:
        """Whether there is a process, and memory that it may hold."""
        return self._process is not None

    def close(self) -> None:
        """End the process, whatever it is doing, for good."""
        self._stopped = True
        self.stop()
        self._log.close()

    def stop(self) -> None:
        """End the process, whatever it is doing; the next call starts another."""
        with self._starting:
            if self._process is not None:
                self._process.kill()
                self._process.join()
                self._process = self._connection = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child, self._log.name, self._environment), daemon=True
        )
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is the parent's to handle
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        child.close()

    def _last_line(self) -> str:
        try:
            lines = Path(self._log.name).read_text(errors="replace").split("\n")
        except OSError:  # closed meanwhile, by another thread
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _end(code: int | None) -> str:
    """How a process with this exit code ended; None: it did not, or nobody can tell."""
    if code is None:
        return "hung up without an exit code"
    if code >= 0:
        return f"died with exit code {code}"
    names = {each.value: each.name for each in signal.Signals}
    return f"died with signal {names.get(-code, -code)}"  # the real-time signals have no names


def _serve(connection: Connection, log: str, environment: Mapping[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for its own children too
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ.update(environment)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            answer = ("ok", function(*args))
        except Exception as error:
            answer = classify(error)
        connection.send(answer)


def classify(error: BaseException) -> tuple[Status, str]:
    """The status and the one-line reason of a result row for an exception."""
    name, text = type(error).__name__, str(error)
    if isinstance(error, (Unsupported, NotImplementedError)):  # the latter from a page, which knows no harness
        return "unsupported", text
    if isinstance(error, MemoryError) or "OutOfMemory" in name or _NO_MEMORY.search(text):
        return "oom", f"out of memory: {text.splitlines()[0] if text else name}"[:200]
    return "error", f"{name}: {text}"
