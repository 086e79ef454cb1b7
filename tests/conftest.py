"""What several test files share: somebody else's package of implementations, and two ways to run a command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.command import main
from harness.parity import CPU_ENVIRONMENT

os.environ.setdefault("XLA_FLAGS", CPU_ENVIRONMENT["XLA_FLAGS"])  # before anybody imports JAX: twice as fast
ROOT = Path(__file__).resolve().parent.parent
ENTRIES = """
from implementations.registry import Implementation

NAMES = "wrong", "slow", "crash", "greedy", "hungry"
ENTRIES = [Implementation(f"ours.{name}", "torch", {"linear": f"ours_{name}"}) for name in NAMES]
"""
PAGE = """
import fcntl
import os
import time

from implementations.torch.ttt_linear import backward, forward as genuine

CALLS = []
MEMORY = open(os.path.join(os.path.dirname(__file__), "ours_entries.py"))


def take_it_all():
    try:
        fcntl.flock(MEMORY, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise MemoryError("another process has it all") from None


def forward(inputs, problem):
    outputs, residuals = genuine(inputs, problem)
    %s
    return outputs, residuals
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first: at the end nobody waits for it alone."""
    items.sort(key=lambda item: item.path.stem not in ("test_survival", "test_command"))


@pytest.fixture(scope="session")
def ours(tmp_path_factory) -> Path:
    """A folder with somebody else's package: `ours.wrong` spoils one element, `ours.slow` takes its time.

    `ours.crash` takes its process with it when it is timed, `ours.greedy` and `ours.hungry` run out of memory beside
    one of their kind.
    """
    folder = tmp_path_factory.mktemp("ours")
    info = folder / "ours-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ttt_lab.implementations]\nours = ours_entries:ENTRIES\n")
    (folder / "ours_entries.py").write_text(ENTRIES)
    (folder / "ours_wrong.py").write_text(PAGE % "outputs.out[1, 40, 1, 3] += 100")
    (folder / "ours_slow.py").write_text(PAGE % "time.sleep(0.1)")
    (folder / "ours_crash.py").write_text(PAGE % "CALLS.append(0); len(CALLS) > 9 and os.abort()")
    for name in ("greedy", "hungry"):
        (folder / f"ours_{name}.py").write_text(PAGE % "take_it_all()")
    return folder


@pytest.fixture
def here(ours, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """What runs a command in this process, which has imported what it needs: its exit code and what it said."""
    monkeypatch.syspath_prepend(ours)

    def run(*arguments: str | Path) -> tuple[int, str]:
        capsys.readouterr()
        return main(list(map(str, arguments))), capsys.readouterr().out

    return run


def command(ours: Path, *arguments: str | Path) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), str(ours)])
    return subprocess.Popen(
        [sys.executable, "-m", "harness", *map(str, arguments)],
        cwd=ours,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "300"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    text, _ = process.communicate(timeout=120)
    return process.returncode, text
