"""What a benchmark run has in common: its device, its parity check, and the file that it leaves."""

from __future__ import annotations

import os
from typing import Any

import pytest

from harness import environment, grid, parity, records
from harness.compare_sides import BENCHMARK_ROWS, benchmark_entry
from harness.environment import Stamp
from harness.parity import Settings
from harness.rows import ParityRow, SweepRow

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is in the same process

stamp_key = pytest.StashKey[Stamp]()
untimed_key = pytest.StashKey[list[SweepRow]]()


def pytest_configure(config: pytest.Config) -> None:
    """Leave the JSON in `results/<device>/`, unless told otherwise."""
    stamp = environment.stamp(environment.find_device())
    config.stash[stamp_key], config.stash[untimed_key] = stamp, []
    if not config.option.benchmark_json and not config.option.collectonly:
        folder = records.results_folder(environment.ROOT / "results" / environment.folder_name(stamp))
        config.option.benchmark_json = folder / "benchmark.json"


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add the cells that have no time, and why."""
    output_json[BENCHMARK_ROWS] = [benchmark_entry(row) for row in config.stash[untimed_key]]


@pytest.fixture(scope="session")
def stamp(pytestconfig: pytest.Config) -> Stamp:
    """Where and with what this run is made."""
    return pytestconfig.stash[stamp_key]


@pytest.fixture(scope="session")
def untimed(pytestconfig: pytest.Config) -> list[SweepRow]:
    """The rows of cells without a time, for the JSON."""
    return pytestconfig.stash[untimed_key]


@pytest.fixture(scope="session")
def checked(request: pytest.FixtureRequest, stamp: Stamp) -> dict[Any, list[ParityRow]]:
    """The parity rows of every cell that is about to be timed, by implementation, case name and problem."""
    chosen: dict[Any, grid.Cell] = {}
    for item in request.session.items:
        cell = item.callspec.params["cell"]  # type: ignore[attr-defined]
        chosen[cell.entry.key, cell.case.name, cell.problem] = cell
    found = parity.run(parity.with_yardstick(chosen.values()), Settings(stamp))
    return {(cell.entry.key, cell.case.name, cell.problem): rows for cell, rows in found}
