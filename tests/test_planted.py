"""Each planted fault is the genuine page with a fault in it, and nothing else."""

from __future__ import annotations

import sys
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console

from harness import doctor
from harness.planted import FAULTS, Edit, Fault, load
from harness.worker import Failure
from implementations.torch import ttt_linear, ttt_mlp
from spec import oracle
from spec.cases import CASES, draw
from spec.problem import INNER_MODELS

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other, ten times as long on a busy machine

PAGES = {"linear": ttt_linear, "mlp": ttt_mlp}
PLANTED = [
    pytest.param(fault, inner, case, dtype, id=f"{fault.name}-{inner}-{case}-{dtype}")
    for fault in FAULTS
    for inner in fault.inner_models
    for case in fault.cases
    for dtype in fault.dtypes
]


class Result(NamedTuple):
    """What two runs of a page on the same tensors gave, and whether it left those tensors alone."""

    tensors: dict[str, torch.Tensor]
    repeats: bool
    kept_its_hands_off: bool


def to_torch(tensors: tuple) -> tuple:
    return type(tensors)(
        *(torch.from_numpy(x.astype(np.float64)).to(getattr(torch, str(x.dtype))) for x in map(np.asarray, tensors))
    )


def run_twice(page, case: str, inner_model: str, dtype: str) -> Result:
    problem = CASES[case].problem(inner_model, dtype)
    drawn = draw(CASES[case], problem)
    inputs, cotangents = map(to_torch, drawn)
    runs = []
    for _ in range(2):
        outputs, residuals = page.forward(inputs, problem)
        gradients = page.backward(cotangents, residuals, problem)
        named = outputs._asdict() | {f"d_{name}": d for name, d in gradients._asdict().items()}
        runs.append({name: tensor.clone() for name, tensor in named.items()})
    untouched = map(to_torch, drawn)
    pairs = [pair for both in zip((inputs, cotangents), untouched, strict=True) for pair in zip(*both, strict=True)]
    same = all(torch.equal(x, y) for x, y in pairs)
    return Result(runs[0], all(torch.equal(x, runs[1][name]) for name, x in runs[0].items()), same)


@cache
def truth(case: str, inner_model: str, dtype: str) -> dict[str, torch.Tensor]:
    problem = CASES[case].problem(inner_model, dtype)
    outputs, gradients, _ = oracle.run(*map(to_torch, draw(CASES[case], problem)), problem)
    return outputs._asdict() | {f"d_{name}": d for name, d in gradients._asdict().items()}


@cache
def genuine(case: str, inner_model: str, dtype: str) -> Result:
    return run_twice(PAGES[inner_model], case, inner_model, dtype)


def relative_rms(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    return ((tensor.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("inner_model", INNER_MODELS)
def test_page_loaded_without_edits_is_the_genuine_one_bit_for_bit(inner_model):
    result = run_twice(load(None, inner_model), "size-d16", inner_model, "fp32")
    expected = genuine("size-d16", inner_model, "fp32")
    assert result.repeats and expected.repeats and result.kept_its_hands_off and expected.kept_its_hands_off
    for name, tensor in expected.tensors.items():
        assert torch.equal(tensor, result.tensors[name]), name


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


@pytest.mark.parametrize("fault, inner_model, case, dtype", PLANTED)
def test_fault_shows_where_the_genuine_page_is_right(fault, inner_model, case, dtype):
    result, right = run_twice(load(fault, inner_model), case, inner_model, dtype), genuine(case, inner_model, dtype)
    expected = truth(case, inner_model, dtype)
    assert right.repeats and right.kept_its_hands_off
    assert all(tensor.isfinite().all() for tensor in right.tensors.values())

    signs = [name for name, tensor in result.tensors.items() if not tensor.isfinite().all()]
    for name, tensor in result.tensors.items():
        error, rounding = relative_rms(tensor, expected[name]), relative_rms(right.tensors[name], expected[name])
        if error > 4 * rounding + torch.finfo(tensor.dtype).eps / 8:
            signs.append(name)
    assert signs or not result.repeats or not result.kept_its_hands_off


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
