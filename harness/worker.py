"""One child process for each implementation: its crash, its memory pool and its hang are its own.

The parent calls `Worker.call(function, ...)`; the child runs it and sends back what it returned or raised. It is a
fresh interpreter, and unlike one of `multiprocessing` it imports the script that the user runs only for a call that
has something of it: other scripts need no `if __name__ == "__main__":`.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from multiprocessing import spawn
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness.frameworks import Unsupported
from harness.rows import Status

# After an illegal access, say, nothing works on the device any more in that process.
_DEVICE_ERROR = re.compile(r"CUDA error|CUDA_ERROR|cudaError|CUDADriverError|CUDARuntimeError")
_NO_MEMORY = re.compile("RESOURCE_EXHAUSTED|MemoryAllocation|out[ _]of[ _]memory", re.IGNORECASE)
# Before a child has the parent's `sys.path` it finds nothing to import.
_START = """
import sys
from multiprocessing.connection import Connection
connection = Connection({})
sys.path[:] = connection.recv()
from harness import worker
worker.serve(connection)
"""
_importing_script = False  # in a child, for functions that are in it


class Failure(Exception):
    """A call that gave no result: `status` as in a result row, and the reason in one line."""

    def __init__(self, status: Status, reason: str):
        super().__init__(reason)
        self.status: Status = status
        self.reason = " ".join(reason.split())[:300] or status


class Unguarded(ValueError):
    """The user's script, imported in a child for functions of it, starts processes itself."""


class Worker:
    """A child process that runs calls one after another; started when first needed, and anew after a crash."""

    def __init__(self, environment: Mapping[str, str] | None = None):
        """`environment` is set in the child before any framework is imported.

        Raises:
            Unguarded: this is a child, and is importing the user's script.
        """
        if _importing_script:
            raise Unguarded(
                "the functions are the script's own, so each process imports it, and that starts others: "
                'put the calls under if __name__ == "__main__":'
            )
        self._environment = dict(environment or {})
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._stopped = False
        self._starting = threading.Lock()
        self._log = tempfile.NamedTemporaryFile(prefix="ttt-lab-worker-", suffix=".log")  # noqa: SIM115

    def call(self, function: Callable, *args: Any, timeout: float) -> Any:
        """`function(*args)` in the child, within `timeout` seconds.

        Raises:
            Failure: it raised, ran out of memory or time, or took the process with it.
            Unguarded: it has something of the user's script, which starts processes as it is imported.
        """
        with self._starting:
            if self._stopped:
                raise Failure("crash", "stopped by the user")
            if self._process is None:
                self._start()
            process, connection = self._process, self._connection
        assert process is not None and connection is not None
        try:
            os.truncate(self._log.name, 0)  # a crash is to be explained by the last words of this call
            connection.send((function, args))
            if not connection.poll(timeout):
                self.stop()
                raise Failure("timeout", f"no result after {timeout:g} s")
            status, value = connection.recv()
        except (EOFError, OSError) as error:
            died, last = _end(process), self._last_line()
            self.stop()
            raise Failure("crash", f"the process {died}{': ' + last if last else ''}") from error
        if status == "unguarded":
            raise Unguarded(value)
        if status != "ok":
            if status in ("error", "oom") and _DEVICE_ERROR.search(value):
                self.stop()
            raise Failure(status, value)
        return value

    @property
    def running(self) -> bool:
        """Whether there is a process, and memory that it may hold."""
        return self._process is not None

    def kill(self) -> None:
        """Begin to end the process; `stop` waits for its end."""
        if (process := self._process) is not None:
            process.kill()

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
                self._process.wait()
                self._process = self._connection = None

    def _start(self) -> None:
        connection, child = multiprocessing.Pipe()
        command = [sys.executable, "-P", "-c", _START.format(child.fileno())]
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C is the parent's to handle
        try:
            with child, open(self._log.name, "ab") as log:
                process = subprocess.Popen(
                    command, pass_fds=[child.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        weakref.finalize(self, process.kill)  # at the end of this one, whatever it is doing
        self._process, self._connection = process, connection
        with suppress(OSError):  # it is gone already: the first call says so
            connection.send(sys.path)
            connection.send((self._environment, _script()))

    def _last_line(self) -> str:
        try:
            lines = Path(self._log.name).read_text(errors="replace").split("\n")
        except OSError:  # closed meanwhile, by another thread
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def stop_all(workers: Iterable[Worker]) -> None:
    """End their processes, all at once: each driver takes its time to give back what its process held."""
    workers = list(workers)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.stop()


def _end(process: subprocess.Popen) -> str:
    """How it ended, if it did and anybody can tell."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    code = process.returncode
    if not code:  # it lives on, or somebody else has reaped it
        return "hung up without an error code"
    if code > 0:
        return f"died with exit code {code}"
    names = {each.value: each.name for each in signal.Signals}
    return f"died with signal {names.get(-code, -code)}"  # the real-time signals have no names


def _script() -> dict[str, Any]:
    """What `multiprocessing` tells its children of the user's script."""
    told = spawn.get_preparation_data("")
    return {name: told[name] for name in ("sys_argv", "init_main_from_name", "init_main_from_path") if name in told}


def serve(connection: Connection) -> None:
    """Run the calls that come in, in the child, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for its own children too
    environment, script = connection.recv()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    os.environ.update(environment)
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            return
        connection.send(_answer(call, script))


def _answer(call: bytes, script: dict[str, Any]) -> tuple[str, Any]:
    global _importing_script
    try:
        if b"__main__" in call:  # a function of the script is pickled by that name, its page is called so
            _importing_script = True
            spawn.prepare(script)  # does nothing if it is there
            _importing_script = False
        function, args = pickle.loads(call)
        return "ok", function(*args)
    except Unguarded as error:
        return "unguarded", str(error)
    except Exception as error:
        return classify(error)
    finally:
        _importing_script = False


def classify(error: BaseException) -> tuple[Status, str]:
    """The status and the one-line reason of a result row for an exception."""
    name, text = type(error).__name__, str(error)
    if isinstance(error, (Unsupported, NotImplementedError)):  # the latter from a page, which knows no harness
        return "unsupported", text
    if isinstance(error, MemoryError) or "OutOfMemory" in name or _NO_MEMORY.search(text):
        return "oom", f"out of memory: {text.splitlines()[0] if text else name}"[:200]
    return "error", f"{name}: {text}"
