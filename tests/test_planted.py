"""Each planted fault is the genuine page with a fault in it, and nothing else; the checker rejects it."""

from __future__ import annotations

import sys

import pytest
import torch
from rich.console import Console

from harness import doctor
from harness.parity import CPU_ENVIRONMENT
from harness.planted import FAULTS, Edit, Fault, load
from harness.worker import Failure, Worker
from implementations.torch import ttt_linear, ttt_mlp
from spec.cases import CASES, draw
from spec.problem import INNER_MODELS

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other, ten times as long on a busy machine

PAGES = {"linear": ttt_linear, "mlp": ttt_mlp}


@pytest.fixture(scope="module")
def worker():
    """A process of its own, since fresh memory is made to hold NaN there."""
    process = Worker(CPU_ENVIRONMENT)
    yield process
    process.close()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_checker_rejects_a_fault_wherever_it_must_show(worker, fault):
    found = worker.call(doctor.diagnose, fault.name, timeout=250.0)
    assert len(found) == len(fault.inner_models) * len(fault.cases) * len(fault.dtypes)
    assert all(found.values()), found


def test_the_checker_accepts_the_genuine_pages(worker):
    assert not any(worker.call(doctor.diagnose, None, timeout=250.0).values())


@pytest.mark.parametrize("inner_model", INNER_MODELS)
def test_page_loaded_without_edits_is_the_genuine_one_bit_for_bit(inner_model):
    problem = CASES["size-d16"].problem(inner_model, "fp32")
    inputs, cotangents = (type(x)(*map(torch.from_numpy, x)) for x in draw(CASES["size-d16"], problem))
    results = []
    for page in (load(None, inner_model), PAGES[inner_model]):
        outputs, residuals = page.forward(inputs, problem)
        results.append((*outputs, *page.backward(cotangents, residuals, problem)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_loading_touches_neither_sys_modules_nor_the_genuine_modules():
    modules, linear = dict(sys.modules), dict(vars(ttt_linear))
    page = load(FAULTS[0], "linear")
    assert dict(sys.modules) == modules and dict(vars(ttt_linear)) == linear
    assert page.blocks is not ttt_linear.blocks and page.scan is not ttt_linear.scan
    assert page.Residuals is page.scan.Residuals


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_declared_well(fault):
    assert [other.name for other in FAULTS].count(fault.name) == 1
    assert fault.about and fault.inner_models and fault.cases and fault.dtypes
    for edit in fault.edits:
        assert edit.old != edit.new
    for case in fault.cases:
        assert CASES[case].group != "named" and set(fault.dtypes) <= set(CASES[case].dtypes)


def test_a_page_that_changed_under_an_edit_raises():
    fault = Fault("stale", "", (Edit("blocks", "no such line", "another"),))
    with pytest.raises(ValueError, match="blocks.py: expected 'no such line' 1 times, found 0"):
        load(fault, "linear")
    fault = Fault("ambiguous", "", (Edit("scan", "zip(", "zip  (", 2),))
    with pytest.raises(ValueError, match=r"scan.py: expected 'zip\(' 2 times, found "):
        load(fault, "linear")


def test_the_doctor_says_what_became_of_the_genuine_pages(monkeypatch, capsys):
    def call(worker, function, name, timeout):
        if name is None:
            raise Failure("crash", "the process died with signal SIGKILL")
        return {"linear size-d16 fp32": "out: far off"}

    monkeypatch.setattr(doctor.Worker, "call", call)
    assert doctor.main(Console()) == 1
    said = capsys.readouterr().out
    assert "the genuine page was rejected on all of its cells: the process died with signal SIGKILL" in said
    assert f"caught {len(FAULTS)} of {len(FAULTS)}" in said


def test_an_inner_model_without_the_fault_raises():
    fault = next(fault for fault in FAULTS if fault.inner_models == ("mlp",))
    with pytest.raises(ValueError, match=f"fault {fault.name}: expected an inner model of mlp, got linear"):
        load(fault, "linear")
