"""The bench as a library and as `harness measure`: what is registered nowhere is checked and timed all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from harness import bench
from implementations.registry import Implementation, implementations
from implementations.torch import ttt_linear
from spec.problem import Problem
from tests import toy
from tests.conftest import ROOT, command, finish

CASE = "size-d16"


def script(folder: Path, *lines: str) -> tuple[int, str, str]:
    """Run these lines as somebody's script: its exit code, what it says, and its errors."""
    path = folder / "script.py"
    path.write_text("\n".join(("from harness import bench", *lines)) + "\n")
    done = subprocess.run(
        [sys.executable, path],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


OWN = "from implementations.torch import ttt_linear", "def forward(*given):", "    return ttt_linear.forward(*given)"


@pytest.mark.parametrize(
    "candidate",
    [
        "tests.toy",
        "tests.toy:ENTRY",
        toy,
        toy.ENTRY,
        (toy.forward, toy.backward),
        [toy.forward, toy.backward],
        "torch.autograd",
    ],
    ids=["name", "entry name", "module", "entry", "functions", "list", "key"],
)
def test_what_may_be_handed_over(candidate):
    entry = bench.implementation(candidate)
    page = entry.page(Problem("linear", 1, 16, 1, 16, 16))
    assert callable(page.forward) and callable(page.backward)
    assert "backward" in entry.passes
    assert entry.key in implementations() or entry.key.startswith(("tests.toy", "toy."))


def test_what_is_right_is_right_in_every_tensor():
    rows = bench.check((toy.forward, toy.backward), CASE, device="cpu")
    assert {row.implementation for row in rows} == {"tests.toy.forward"}
    assert {row.status for row in rows} == {"ok"}
    assert [row.tensor for row in rows][:2] == ["out", "final_w1"] and len(rows) == 12


def test_what_is_wrong_is_wrong_and_never_timed():
    checked, timed = bench.check_and_measure(
        (toy.wrong_forward, toy.backward), CASE, device="cpu", beside=["torch.eager"], passes=["forward"]
    )
    assert {row.tensor for row in checked if row.status == "wrong"} == {"out"}
    status = {row.implementation: row.status for row in timed}
    assert status == {"tests.toy.wrong_forward": "wrong", "torch.eager": "ok"}


def test_a_forward_alone_is_timed_forward_unless_another_pass_is_named():
    rows = bench.measure(toy.forward, CASE, device="cpu")
    assert {row.pass_: row.status for row in rows} == {"forward": "ok"} and rows[0].device_ms > 0
    rows = bench.measure(toy.forward, CASE, device="cpu", passes=["forward_backward"])
    assert {row.pass_: row.status for row in rows} == {"forward_backward": "unsupported"}


def test_one_name_may_stand_for_a_list_of_them():
    rows = bench.measure("torch.autograd", CASE, device="cpu", passes="forward", beside="torch.eager", caches="warm")
    assert [(row.implementation, row.pass_, row.cache, row.status) for row in rows] == [
        ("torch.autograd", "forward", "warm", "ok"),
        ("torch.eager", "forward", "warm", "ok"),
    ]


def test_a_gradient_that_is_missing_is_named_with_what_was_expected():
    (row,) = bench.check((toy.forward, toy.backward_without_lr), CASE, device="cpu")
    assert row.reason == "ValueError: d_lr: expected (B, T, H) = (2, 64, 2) of float32, got None"
    (row,) = bench.check(toy.forward_without_state, CASE, device="cpu")
    assert row.reason == "ValueError: final_b1: expected (B, H, D) = (2, 2, 16) of float32, got float"


def test_a_crash_costs_its_own_rows_only():
    rows = bench.measure(toy.crash, CASE, device="cpu", beside=["torch.eager"], passes=["forward"])
    assert {row.implementation: row.status for row in rows} == {"tests.toy.crash": "crash", "torch.eager": "ok"}


@pytest.mark.parametrize(
    "candidate, message",
    [
        (lambda inputs, problem: None, "expected what another process can import: put it into a module, got "),
        ((toy.forward, 3), "candidate: expected .forward, backward., got "),
        (3, "candidate: expected an Implementation, a module or functions, got 3"),
        (ModuleType("empty"), "empty: expected a function forward in it, got none"),
        ("no.such:THING", "no.such:THING: expected a key or package.module:ENTRY, got No module named 'no'"),
        ("tests.toy:THING", "tests.toy:THING: expected a key or package.module:ENTRY, got .*no attribute 'THING'"),
        (
            Implementation("a.lambda", "torch", {"linear": ttt_linear.__name__}, supports=lambda problem: None),
            "a.lambda: expected what another process can import",
        ),
    ],
    ids=["lambda", "pair", "number", "module", "name", "attribute", "entry"],
)
def test_what_cannot_be_run_is_one_clear_line(candidate, message):
    with pytest.raises(ValueError, match=message):
        bench.check(candidate, CASE, device="cpu")


@pytest.mark.parametrize(
    ("source", "got"),
    [
        ("def forward(", "SyntaxError: '(' was never closed (broken.py, line 1)"),
        ("raise RuntimeError('no GPU,\\nno kernel')", "RuntimeError: no GPU, no kernel"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_clear_line(tmp_path, source, got):
    (tmp_path / "broken.py").write_text(source)
    code, said = finish(command(tmp_path, "measure", "broken"))
    assert (code, said) == (2, f"error: broken: its import failed with {got}\n")


def test_an_unknown_case_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown case 'size-d17' \(did you mean size-d16\?\)"):
        bench.check(toy, "size-d17", device="cpu")


def test_the_command_measures_a_module_in_the_current_folder(tmp_path):
    (tmp_path / "mine.py").write_text("from implementations.torch.ttt_linear import backward, forward\n")
    arguments = "measure", "mine", "--case", CASE, "--device", "cpu", "--passes", "forward"
    code, text = finish(command(tmp_path, *arguments))
    assert code == 0, text
    assert "12/12" in text and "median ms of one call" in text
    code, text = finish(command(tmp_path, *arguments, "--check-only", "--dtype", "fp64"))
    assert code == 0 and "median" not in text
    (tmp_path / "half.py").write_text("from implementations.torch.ttt_linear import forward\n")
    code, text = finish(command(tmp_path, "measure", "half", "--case", CASE, "--device", "cpu"))
    assert code == 0 and "median" in text, text
    assert finish(command(tmp_path, "measure", "nobody"))[0] == 2


def test_functions_of_a_script_are_checked_and_timed(tmp_path):
    call = f'bench.measure(forward, "{CASE}", device="cpu", passes=["forward"])'
    code, said, errors = script(
        tmp_path, *OWN, "if __name__ == '__main__':", f"    print(*(row.status for row in {call}))"
    )
    assert (code, said, errors) == (0, "ok\n", "")


def test_a_script_without_a_guard_works_where_the_functions_are_in_a_module(tmp_path):
    call = f'bench.measure("implementations.torch.ttt_linear", "{CASE}", device="cpu", passes=["forward"])'
    assert script(tmp_path, f"print(*(row.status for row in {call}))") == (0, "ok\n", "")


def test_a_script_without_a_guard_for_its_own_functions_is_one_clear_line(tmp_path):
    code, said, errors = script(tmp_path, *OWN, f'bench.check(forward, "{CASE}", device="cpu")')
    assert (code, said) == (1, "") and errors.count("Traceback") == 1 and len(errors.splitlines()) < 12
    assert errors.splitlines()[-1].endswith('put the calls under if __name__ == "__main__":')
