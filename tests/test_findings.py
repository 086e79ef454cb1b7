"""The findings: every one has words and code, and the page says what was measured, where, and what was not."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from harness import findings, findings_runs
from harness.command import main
from harness.findings_list import FINDINGS, Finding


def test_every_finding_has_a_function_and_every_function_a_finding():
    assert sorted(finding.name for finding in FINDINGS) == sorted(findings_runs.RUNS)
    assert all(finding.title and len(finding.text) > 20 for finding in FINDINGS)


def test_the_committed_page_is_that_of_the_committed_numbers():
    measured = json.loads((findings.FOLDER / "findings.json").read_text(encoding="utf-8"))
    assert set(measured) <= set(findings_runs.RUNS)
    assert (findings.FOLDER / "findings.md").read_text(encoding="utf-8") == findings.render(FINDINGS, measured)


def test_the_page_says_what_was_measured_and_what_was_not():
    some = [f for f in FINDINGS if f.name in ("official-gelu-torch", "ttt-tk-eps-gradients")]
    entry = {"found": {"an | error": 0.12345}, "machine": "a CPU", "versions": "x==1", "started_at": "2026-01-02T03:04"}
    page = findings.render(some, {"official-gelu-torch": entry})
    assert "| an | error | 0.123 |" in page and "On a CPU, 2026-01-02, with x==1." in page
    assert page.count("Not measured yet: it needs an H100.") == 1
    assert "To reproduce: `python -m harness findings ttt-tk-eps-gradients`" in page
    assert "def ttt_tk_eps_gradients() -> Found:" in page


def test_what_was_measured_elsewhere_stays(tmp_path, capsys):
    kept = {"ttt-tk-eps": {"found": {"error": 1.0}, "machine": "an H100", "versions": "", "started_at": "2026-01-02T"}}
    (tmp_path / "findings.json").write_text(json.dumps(kept))
    assert main(["findings", "ttt-tk-eps-in-our-page", "--folder", str(tmp_path)]) == 0
    measured = json.loads((tmp_path / "findings.json").read_text())
    assert measured["ttt-tk-eps"] == kept["ttt-tk-eps"]
    found = measured["ttt-tk-eps-in-our-page"]["found"]
    assert found["stress-near-constant-rows: RMS error of d_xk, relative"] > 1
    assert found["lm-1.3b-small: RMS error of d_xk, relative"] > 1e-4


def test_what_does_not_reproduce_is_not_written(tmp_path, monkeypatch):
    broken = Finding("no-such-run", "a project", "a title", "some text that is long enough")
    found, error = findings.reproduce(broken)
    assert found == {} and error.startswith("did not run (exit code 1): KeyError")
    monkeypatch.setattr(findings, "reproduce", lambda finding: ({}, "did not run"))
    assert main(["findings", "ttt-tk-eps-in-our-page", "--folder", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "findings.json").read_text()) == {}


def test_an_unknown_finding_lists_the_valid_ones(tmp_path, capsys):
    assert main(["findings", "ttt-tk-ep", "--folder", str(tmp_path)]) == 2
    assert "did you mean ttt-tk-eps?" in capsys.readouterr().out.replace("\n", "")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three findings in place of all, and the names of those that ran; `reproduce` of nothing but a name."""
    words = "a project", "a title", "some text that is long enough"
    some = (
        Finding("ttt-tk-eps-in-our-page", *words),
        Finding("ttt-tk-determinism", *words, "h100"),
        Finding("ttt-tk-eps", *words, packages=("pytest", "no-such-package")),
    )
    ran = []
    monkeypatch.setattr(findings, "FINDINGS", some)
    monkeypatch.setattr(findings, "reproduce", lambda finding: (ran.append(finding.name) or {}, None))
    monkeypatch.setattr(findings.environment, "find_device", lambda: "cpu")
    monkeypatch.setattr(findings, "console", Console(width=1000))
    return ran


def test_by_default_what_cannot_run_here_is_left_out_and_said(runs, tmp_path, capsys):
    assert main(["findings", "--folder", str(tmp_path)]) == 0
    assert runs == ["ttt-tk-eps-in-our-page"]
    assert capsys.readouterr().out.splitlines()[:2] == [
        "left out: ttt-tk-determinism: needs an H100",
        'left out: ttt-tk-eps: no-such-package is not installed: pip install ".[peers]"',
    ]


def test_what_was_named_and_cannot_run_here_is_a_failure_and_is_not_run(runs, tmp_path, capsys):
    assert main(["findings", "ttt-tk-eps", "ttt-tk-eps-in-our-page", "--folder", str(tmp_path)]) == 1
    assert runs == ["ttt-tk-eps-in-our-page"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == 'cannot run here: ttt-tk-eps: no-such-package is not installed: pip install ".[peers]"'
    assert main(["findings", "ttt-tk-determinism", "--folder", str(tmp_path)]) == 1
    assert runs == ["ttt-tk-eps-in-our-page"] and "needs an H100" in capsys.readouterr().out


@pytest.mark.parametrize("name", [f.name for f in FINDINGS if f.packages and f.needs == "any"])
def test_what_needs_a_peer_reproduces_where_it_is_installed(name):
    finding = next(f for f in FINDINGS if f.name == name)
    if why := findings.cannot_run(finding, "cpu"):
        pytest.skip(why)
    found, error = findings.reproduce(finding)
    assert error is None and found
