"""The checker is checked: every planted fault must be rejected, and the genuine pages must not be."""

from __future__ import annotations

import functools
import tempfile
from itertools import product
from pathlib import Path

from rich.console import Console

from harness import jobs, rule
from harness.check import TensorCheck, Truth, examine
from harness.frameworks import open_framework
from harness.parity import CPU_ENVIRONMENT
from harness.planted import FAULTS, Fault, load
from harness.worker import Failure, Worker, classify
from spec.cases import CASES, Case, draw
from spec.problem import PASSES, Problem

SEED = 0


def main(console: Console) -> int:
    """Print what gave each fault away, and "caught N of N"; the exit code is 1 if any cell was missed."""
    worker, caught = Worker(CPU_ENVIRONMENT), 0
    try:
        for fault in FAULTS:
            try:
                found = worker.call(diagnose, fault.name, timeout=300.0)
            except Failure as failure:
                found = {"all of its cells": None}
                console.print(f"  {fault.name}: {failure.reason}", markup=False, soft_wrap=True)
            missed = [cell for cell, reason in found.items() if reason is None]
            caught += not missed
            verdict = f"MISSED in {', '.join(missed)}" if missed else next(iter(found.values()))
            text = f"  {fault.name}: {fault.about}\n      {verdict}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        try:
            genuine = worker.call(diagnose, None, timeout=300.0)
        except Failure as failure:
            genuine = {"all of its cells": failure.reason}
        rejected = {cell: reason for cell, reason in genuine.items() if reason}
        for cell, reason in rejected.items():
            console.print(f"  the genuine page was rejected on {cell}: {reason}", markup=False, soft_wrap=True)
    finally:
        worker.close()
    console.print(f"caught {caught} of {len(FAULTS)}")
    return 0 if not rejected and caught == len(FAULTS) else 1


def diagnose(name: str | None) -> dict[str, str | None]:
    """For each cell that the fault `name` must show in, why it was rejected, or None if it was not.

    For the genuine pages (None) the cells are those of all faults.
    """
    fault = next(fault for fault in FAULTS if fault.name == name) if name else None
    cells = {cell for each in ([fault] if fault else FAULTS) for cell in _cells(each)}
    return {" ".join(cell): _reject(fault, *cell) for cell in sorted(cells)}


def _cells(fault: Fault) -> list[tuple[str, str, str]]:
    return list(product(fault.inner_models, fault.cases, fault.dtypes))


def _reject(fault: Fault | None, inner_model: str, case_name: str, dtype: str) -> str | None:
    case = CASES[case_name]
    problem = case.problem(inner_model, dtype)  # type: ignore[arg-type]
    try:
        checks = _examine(fault, case, problem)
    except Exception as error:  # a fault may well raise: that is a rejection too
        return ": ".join(classify(error))
    yardstick = {check.tensor: check for check in _genuine(case_name, problem)} if fault else {}
    verdicts = [rule.judge(check, yardstick.get(check.tensor), case, problem) for check in checks]
    worst = max(verdicts, key=lambda verdict: (verdict.reason is not None, verdict.error_ratio or float("inf")))
    return worst.reason


@functools.cache
def _genuine(case_name: str, problem: Problem) -> list[TensorCheck]:
    return _examine(None, CASES[case_name], problem)


def _examine(fault: Fault | None, case: Case, problem: Problem) -> list[TensorCheck]:
    page, drawn = load(fault, problem.inner_model), draw(case, problem, SEED)
    truth = _truth(case.name, problem)
    return examine(page, problem, PASSES, drawn, open_framework("torch", "cpu"), truth, case.strided)


@functools.cache
def _truth(case_name: str, problem: Problem) -> Truth:
    with tempfile.TemporaryDirectory(prefix="ttt-lab-truth-") as folder:
        jobs.save_truth(CASES[case_name], problem, SEED, "cpu", Path(folder))
        return jobs.load_truth(problem, Path(folder))
