"""Comparisons of synthetic results: what is planted is found, what is noise is not, and nothing passes in silence."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas
import pytest

from harness import records
from harness.command import main
from harness.compare import Section, Settings, compare
from harness.compare_markdown import LIMIT, MARKER, escape, markdown
from harness.compare_sides import BENCHMARK_ROWS, benchmark_entry
from harness.rows import SampleRow, columns
from tests.test_records import failed, parity_row, sweep_row

BLOCKS, CALLS = 5, 8
GPU = {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "driver": "580.1", "timer": "cupti", "fingerprint": "f1"}
CUDA = {"device": "cuda"}


def cells(count: int, **changes) -> list:
    """Rows of `count` cells of two implementations, in milliseconds."""
    names = ("torch.eager", "jax.scan")
    made = {**GPU, "processes": 2, "samples": 2 * BLOCKS * CALLS, "source_hash": "s1", **changes}
    return [sweep_row(implementation=names[n % 2], case=f"case-{n // 2}", **made) for n in range(count)]


def samples(rows, rng, processes=2, ratios=None) -> pandas.DataFrame:
    """Calls of each row that is ok: processes differ by 0.3 %, calls of one process by 1 %."""
    rows, count = [row for row in rows if row.status == "ok"], processes * BLOCKS * CALLS
    if not rows:
        return pandas.DataFrame()
    shape = len(rows), processes, BLOCKS, CALLS
    noise = 0.003 * rng.standard_normal((*shape[:2], 1, 1)) + 0.01 * rng.standard_normal(shape)
    level = np.array([row.device_ms * (ratios or {}).get(row.case, 1.0) for row in rows])
    times = (level[:, None, None, None] * np.exp(noise)).ravel()
    own = {"process": np.indices(shape)[1].ravel(), "block": np.indices(shape)[2].ravel()}
    own |= {"device_ms": times, "host_ms": times + 0.1, "sm_clock_mhz": 1980.0}
    cell = [name for name in columns(SampleRow) if name not in own]
    values = {name: [getattr(row, "pass_" if name == "pass" else name) for row in rows] for name in cell}
    table = pandas.DataFrame({name: np.repeat(np.array(of), count) for name, of in values.items()} | own)
    return table[list(columns(SampleRow))]


def write(folder: Path, sweep=(), parity=(), seed=0, ratios=None, processes=2, sampled=True, gpu=GPU["gpu"]) -> str:
    """A results folder, as a sweep leaves it."""
    folder.mkdir(parents=True)
    records.append(folder / "sweep.csv", list(sweep))
    records.append(folder / "parity.csv", list(parity))
    table = samples(sweep, np.random.default_rng(seed), processes, ratios)
    if sampled and len(table):
        table.to_parquet(folder / "samples.parquet", index=False)
    (folder / "environment.json").write_text(json.dumps({"device": "cuda", "gpu": gpu}))
    return str(folder)


def run(*arguments: str) -> int:
    return main(["compare", *arguments])


@pytest.fixture
def both(tmp_path):
    """Write BASE and HEAD and compare them."""

    def both(base: dict, head: dict, **settings):
        for name in ("base", "head"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        one = write(tmp_path / "base", **{"seed": 0} | base)
        return compare(one, write(tmp_path / "head", **{"seed": 1} | head), Settings(**settings))

    return both


def kinds(found) -> list[tuple[str, tuple[str, ...]]]:
    return [(finding.kind, finding.parts) for finding in found.findings]


@pytest.mark.parametrize("seed", range(10))
def test_a_planted_slowdown_is_flagged_and_nothing_else(both, seed):
    rows = cells(40)
    ratios = {"case-3": 1.05, "case-7": 0.94}
    found = both({"sweep": rows, "seed": 100 + seed}, {"sweep": rows, "seed": seed, "ratios": ratios})
    assert {timing.base.case for timing in found.of("regression")} == {"case-3"} and len(found.of("regression")) == 2
    assert {timing.base.case for timing in found.of("improvement")} == {"case-7"} and len(found.of("improvement")) == 2
    assert (found.failures, found.exit_code) == (["performance"], 11)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("count", [2, 150])
def test_an_a_a_pair_is_not_flagged(both, seed, count):
    rows = cells(count)
    found = both({"sweep": rows, "seed": 100 + seed}, {"sweep": rows, "seed": seed}, threshold=0.001)
    assert not found.of("regression") and not found.of("improvement")
    assert found.exit_code == 0 and len(found.timings) == count
    if count > 100:
        assert 0.004 < found.noise_floor.share < 0.012 and found.noise_floor.pairs == count
        assert any("threshold of 0.1% is below the noise floor" in text for text in found.labels)


def test_a_slowdown_below_the_threshold_does_not_fail(both):
    rows = cells(40)
    found = both({"sweep": rows}, {"sweep": rows, "ratios": {"case-3": 1.02}})
    assert found.exit_code == 0
    assert both({"sweep": rows}, {"sweep": rows, "ratios": {"case-3": 1.02}}, threshold=0.01).exit_code == 11


def test_a_few_cells_suffice(both):
    given = {"sweep": cells(2), "processes": 3}
    assert both(given, given | {"ratios": {"case-0": 1.05}}).exit_code == 11


def test_the_noise_floor_without_a_a_pairs_is_of_halves(both):
    found = both({"sweep": cells(40)}, {"sweep": cells(40, source_hash="s2")})
    assert found.noise_floor.pairs == 80 and "odd against the even" in found.noise_floor.source


def test_one_process_makes_suspects(both):
    rows = cells(20, processes=1, samples=BLOCKS * CALLS)
    found = both({"sweep": rows, "processes": 1}, {"sweep": rows, "processes": 1, "ratios": {"case-3": 1.5}})
    assert found.exit_code == 0 and {timing.base.case for timing in found.of("suspect")} == {"case-3"}
    assert any("fewer than 2 processes" in text for text in found.labels) and found.noise_floor.pairs == 20


def test_times_of_a_cpu_are_not_judged(both):
    rows = cells(20, device="cpu", gpu="a processor", timer="host_sync")
    other = cells(20, device="cpu", gpu="another", timer="host_sync")
    found = both({"sweep": rows}, {"sweep": other, "ratios": {"case-3": 2.0}})
    assert found.exit_code == 0 and len(found.of("not judged")) == 20 and found.noise_floor is None
    assert any("no performance claim" in text for text in found.labels)
    assert any("gpu differs in 20 of 20" in text for text in found.labels)
    assert both({"sweep": rows}, {"sweep": rows[1:]}).exit_code == 12


def test_a_vanished_row(both):
    found = both({"sweep": cells(10)}, {"sweep": cells(9)})
    assert kinds(found) == [("missing", ("forward cold",))] and found.exit_code == 12
    assert both({"sweep": cells(9)}, {"sweep": cells(10)}).exit_code == 0
    rows = [parity_row(**CUDA), parity_row(**CUDA, tensor="d_xq")]
    found = both({"parity": rows}, {"parity": rows[:1]})
    assert kinds(found) == [("missing", ("d_xq",))] and found.exit_code == 12
    found = both({"parity": [*rows, parity_row(**CUDA, seed=1)]}, {"parity": rows})
    assert kinds(found) == [("missing", ("out",))] and "seed 1" in found.findings[0].cell


@pytest.mark.parametrize("status", ["oom", "timeout", "crash", "error", "unsupported"])
def test_newly_failing(both, status):
    rows = cells(10)
    found = both({"sweep": rows}, {"sweep": [*rows[1:], failed(sweep_row, status, **GPU, case="case-0")]})
    assert kinds(found) == [("newly failing", ("forward cold",))] and found.exit_code == 12
    assert found.findings[0].detail == f"ok → {status}: 40 GiB, asked for 80"


def test_a_cell_whose_check_fails_as_a_whole_has_no_missing_tensors(both):
    """The rows of the run before are still in the file: those of the last run count."""
    rows = [parity_row(**CUDA), parity_row(**CUDA, tensor="d_xq")]
    crash = failed(parity_row, "crash", **CUDA, tensor="", run_id="r2", started_at="2026-01-02T00:00:00Z")
    found = both({"parity": rows}, {"parity": [*rows, crash]})
    assert kinds(found) == [("newly failing", ())] and found.exit_code == 12
    found = both({"parity": [*rows, crash]}, {"parity": rows})
    assert kinds(found) == [("fixed", ("out", "d_xq"))] and found.exit_code == 0
    assert not both({"parity": [crash]}, {"parity": [crash]}).findings
    mended = [parity_row(**CUDA, run_id="r3", started_at="2026-01-03T00:00:00Z")]
    assert kinds(both({"parity": rows[:1]}, {"parity": [*mended, crash]})) == []


def test_wrong_in_head(both):
    right, rows = [parity_row(**CUDA), parity_row(**CUDA, tensor="d_xq")], cells(2)
    wrong = failed(parity_row, "wrong", **CUDA, tensor="d_xq")
    found = both({"parity": right}, {"parity": [right[0], wrong]})
    assert kinds(found) == [("wrong", ("d_xq",))] and found.exit_code == 10
    assert kinds(both({"sweep": rows}, {"sweep": rows, "parity": [wrong]})) == [("wrong", ("d_xq",))]
    skipped = failed(parity_row, "unsupported", **CUDA, tensor="")
    assert both({"parity": [skipped]}, {"parity": [wrong]}).exit_code == 10  # newly written, and wrong
    found = both({"parity": [wrong]}, {"parity": [wrong]})
    assert found.exit_code == 0 and found.failing == 1
    untimed = failed(sweep_row, "wrong", **GPU, implementation="jax.scan", case="case-0")
    found = both({"sweep": rows}, {"sweep": [rows[0], untimed]})
    assert kinds(found) == [("wrong", ("forward cold",))] and found.exit_code == 10


def test_worse_errors(both):
    def rows(ratio):
        return {"parity": [parity_row(**CUDA, error_ratio=ratio)]}

    found = both(rows(0.3), rows(0.7))
    assert kinds(found) == [("less accurate", ("out",))] and found.exit_code == 10
    assert found.findings[0].detail == "error_ratio 0.3 → 0.7"
    for base, head, factor in ((0.3, 0.55, 2), (0.01, 0.4, 2), (0.3, 0.7, 3), (0.7, 0.3, 2)):
        assert both(rows(base), rows(head), error_ratio_factor=factor).exit_code == 0


def test_all_failures_at_once_and_the_worst_first(both):
    rows, right = cells(40), parity_row(**CUDA)
    wrong = failed(parity_row, "wrong", **CUDA)
    head = {"sweep": rows[:-1], "parity": [wrong], "ratios": {"case-3": 1.1}}
    found = both({"sweep": rows, "parity": [right]}, head)
    assert found.failures == ["parity", "incomplete", "performance"] and found.exit_code == 10


def test_another_gpu_is_refused_or_labelled(both, tmp_path):
    rows, other = cells(20), cells(20, gpu="NVIDIA H200")
    given = {"sweep": rows}, {"sweep": other, "gpu": "NVIDIA H200", "ratios": {"case-3": 2.0}}
    with pytest.raises(ValueError, match="expected one GPU, got NVIDIA H100 80GB HBM3 and NVIDIA H200: refused"):
        both(*given)
    found = both(*given, across_devices=True)
    assert "ACROSS DEVICES, NVIDIA H100 80GB HBM3 and NVIDIA H200: no time is judged" in found.labels[0]
    assert len(found.of("not judged")) == 20 and found.exit_code == 0
    rows_of_parity = {"parity": [parity_row(**CUDA)]}
    with pytest.raises(ValueError, match="expected one GPU"):  # environment.json says it
        both(rows_of_parity, rows_of_parity | {"gpu": "NVIDIA H200"})
    assert run(str(tmp_path / "base"), str(tmp_path / "head")) == 13
    with pytest.raises(ValueError, match="and unknown: refused"):
        both({"sweep": rows}, {"sweep": cells(20, gpu="")})


def test_what_differs_beside_the_source_is_said(both):
    rows = cells(4, versions="torch==2.11 jax==0.11")
    other = cells(4, versions="torch==2.12 jax==0.11", driver="590.2", fingerprint="f2")
    found = both({"sweep": rows}, {"sweep": other})
    text = "\n".join(found.labels)
    assert "versions differs in 4 of 4 rows: torch==2.11 → torch==2.12" in text and "jax" not in text
    assert "driver differs in 4 of 4 rows: 580.1 → 590.2" in text and "fingerprint differs" in text


def test_another_timer_is_not_compared(both):
    rows = cells(10)
    head = [*rows[:9], *cells(10, timer="cuda_events")[9:]]
    found = both({"sweep": rows}, {"sweep": head, "ratios": {"case-4": 2.0}})
    assert kinds(found) == [("not comparable", ("forward cold",))]
    assert found.findings[0].detail == "timer cupti → cuda_events" and "incomplete" in found.failures
    assert len(found.timings) == 9


def test_samples_that_are_not_there(both):
    rows = cells(10)
    found = both({"sweep": rows}, {"sweep": rows, "sampled": False})
    assert {finding.detail for finding in found.findings} == {"HEAD has no samples of it"} and found.exit_code == 12
    found = both({"sweep": rows, "processes": 1}, {"sweep": rows})
    assert {finding.detail for finding in found.findings} == {"BASE has samples of 1 of 2 processes"}
    found = both({"sweep": rows}, {"sweep": cells(10, samples=81)})
    assert {finding.detail for finding in found.findings} == {"HEAD has 80 of 81 samples"}


def test_samples_of_another_run_are_not_the_row_s(tmp_path):
    rows = cells(6)
    base, head = write(tmp_path / "base", rows), write(tmp_path / "head", rows)
    records.append(tmp_path / "head" / "sweep.csv", cells(6, run_id="r2"))
    found = compare(base, head, Settings())
    assert {finding.detail for finding in found.findings} == {"HEAD has no samples of it"}


@pytest.mark.parametrize("file", ["sweep.csv", "parity.csv"])
@pytest.mark.parametrize("side", ["base", "head"])
def test_a_truncated_csv_is_said_every_time_and_incomplete(tmp_path, capsys, file, side):
    rows, parity = cells(10), [parity_row(**CUDA, seed=seed) for seed in range(5)]
    sides = [write(tmp_path / name, rows, parity) for name in ("base", "head")]
    path = tmp_path / side / file
    path.write_bytes(path.read_bytes()[:-20])
    torn = path.read_bytes()
    for _ in range(2):
        assert run(*sides, "--markdown", str(tmp_path / "out.md")) == 12
        said = f"{side}/{file}:" in capsys.readouterr().out.replace("\n", "")
        assert said and "dropped a torn last line" in (tmp_path / "out.md").read_text()
    assert path.read_bytes() == torn
    path.write_bytes(b"")
    found = compare(*sides, Settings())
    assert found.damage == [f"{tmp_path / side / file} has no rows"] and found.exit_code == 12


def test_a_truncated_parquet_file_is_an_error(tmp_path, capsys):
    rows = cells(4)
    sides = [write(tmp_path / name, rows) for name in ("base", "head")]
    path = tmp_path / "head" / "samples.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert run(*sides) == 13
    assert "not a Parquet file that can be read" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["sweep.csv", "parity.csv"])
def test_another_schema_is_an_error_in_every_report(tmp_path, capsys, file):
    sides = [write(tmp_path / name, cells(4), [parity_row(**CUDA)]) for name in ("base", "head")]
    path = tmp_path / "head" / file
    header, _, rest = path.read_text().partition("\n")
    path.write_text(f"{header},energy_j\n{rest}")
    assert run(*sides, "--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")) == 13
    said = capsys.readouterr().out
    assert f"{tmp_path}/head/{file}: columns unknown energy_j" in said
    assert json.loads((tmp_path / "out.json").read_text())["exit_code"] == 13
    report = (tmp_path / "out.md").read_text()
    assert report.startswith(MARKER) and "harness error" in report and "energy\\_j" in report


def test_nothing_in_common_does_not_pass(both):
    found = both({"sweep": cells(4)}, {"sweep": cells(4, cache="warm")})
    assert found.exit_code == 12 and "no cell is on both sides: nothing was compared" in found.damage


@pytest.mark.parametrize("text", ["no-such-thing", "-x"])
def test_what_is_no_side_is_an_error(tmp_path, capsys, text):
    side = write(tmp_path / "base", cells(2))
    assert run("--", side, text) == 13
    said = capsys.readouterr().out
    assert f"expected a results folder, a pytest-benchmark JSON file or a git revision, got {text!r}" in said
    (tmp_path / "empty").mkdir()
    assert run(side, str(tmp_path / "empty")) == 13
    assert "expected parity.csv, sweep.csv, static.csv in it or in its folders" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--threshold", "0"], ["--threshold", "x"], ["--error-ratio-factor", "1"]])
def test_a_bad_option_is_a_mistake_in_the_command(option):
    with pytest.raises(SystemExit, match="2"):
        run("a", "b", *option)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_git_revisions(tmp_path, monkeypatch, capsys):
    """Every device that both have; one that is gone is missing, one that is new is said."""
    repo, results = tmp_path / "repo", tmp_path / "repo" / "results"
    rows, slow = cells(40), cells(40, source_hash="s2")
    write(results / "h100", rows, seed=0)
    write(results / "h200", rows, seed=1)
    git(repo.parent, "init", "-q", "-b", "main", "repo")
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", "base")
    shutil.rmtree(results / "h100")
    write(results / "h100", slow, seed=2, ratios={"case-3": 1.06})
    git(repo, "commit", "-qam", "slower")
    (repo / "deeper").mkdir()
    monkeypatch.chdir(repo / "deeper")
    found = compare("main~1", "main", Settings())
    assert {timing.where for timing in found.timings} == {"h100", "h200"} and not found.labels
    assert {(timing.where, timing.base.case) for timing in found.of("regression")} == {("h100", "case-3")}
    assert found.exit_code == 11

    git(repo, "mv", "results/h200", "results/b200")
    git(repo, "commit", "-qm", "another device")
    found = compare("main~1", "main", Settings())
    assert found.damage == ["main has no results of h200, main~1 has"] and found.exit_code == 12
    assert found.labels == ["b200: new results, with nothing to compare them to."]

    found = compare("main~2", str(results / "h100"), Settings())  # a folder beside a revision: that device
    assert found.exit_code == 11 and {timing.where for timing in found.timings} == {"h100"}
    assert run("main~2", str(results / "b200")) == 13
    assert "main~2 has h100, h200; " in capsys.readouterr().out.replace("\n", "")
    found = compare(str(results), str(results), Settings())
    assert found.exit_code == 0 and len(found.timings) == 80

    git(repo, "rm", "-rq", "results")
    git(repo, "commit", "-qm", "nothing")
    assert run("main~1", "main") == 13 and "main: has no results/" in capsys.readouterr().out


def benchmark_file(path: Path, rows, times: dict, more=()) -> str:
    benchmarks = [
        {"name": row.case, "extra_info": benchmark_entry(row), "stats": {"data": [t / 1e3 for t in times[row.case]]}}
        for row in rows
    ]
    path.write_text(json.dumps({"benchmarks": benchmarks, BENCHMARK_ROWS: [benchmark_entry(row) for row in more]}))
    return str(path)


def test_pytest_benchmark_files(tmp_path):
    rng = np.random.default_rng(0)
    rows = [sweep_row(case=f"case-{n}", **GPU | {"timer": "host_sync"}) for n in range(5)]
    base = {row.case: 1 + 0.01 * rng.standard_normal(20) for row in rows}
    head = {row.case: (1.4 if row is rows[3] else 1) + 0.01 * rng.standard_normal(20) for row in rows}
    wrong = failed(sweep_row, "wrong", **GPU | {"timer": "host_sync"}, case="case-0")
    one = benchmark_file(tmp_path / "one.json", rows, base)
    found = compare(one, benchmark_file(tmp_path / "two.json", rows, head), Settings())
    assert found.exit_code == 0 and [timing.base.case for timing in found.of("suspect")] == ["case-3"]
    assert found.of("suspect")[0].ratio == pytest.approx(1.4, rel=0.02)
    assert found.of("suspect")[0].base_ms == pytest.approx(1, rel=0.02)
    assert any("never a regression" in text for text in found.labels)

    assert compare(one, benchmark_file(tmp_path / "two.json", rows[1:], head), Settings()).exit_code == 12
    assert compare(one, benchmark_file(tmp_path / "two.json", rows[1:], head, [wrong]), Settings()).exit_code == 10

    with pytest.raises(ValueError, match="expected two pytest-benchmark files or none"):
        compare(one, write(tmp_path / "folder", cells(2)), Settings())
    content = json.loads(Path(one).read_text())
    del content["benchmarks"][0]["extra_info"]["source_hash"]
    Path(one).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="one.json: extra_info: columns missing source_hash"):
        compare(one, one, Settings())
    for text in ("{", "[]", '{"benchmarks": [{}]}'):
        Path(one).write_text(text)
        with pytest.raises(ValueError, match="one.json: expected a pytest-benchmark file of nox -s bench"):
            compare(one, one, Settings())


def test_sections_of_others_count(tmp_path):
    folders = []

    def spills(base: Path, head: Path):
        folders.append((base, head))
        assert (base / "sweep.csv").exists() and (head / "sweep.csv").exists()
        return [Section("performance", "1 kernel spills", ["| a | b |"]), Section("note", "the same", ["fine"])]

    sides = [write(tmp_path / name, cells(4)) for name in ("base", "head")]
    found = compare(*sides, Settings(), extras=[spills])
    assert len(folders) == 1 and found.exit_code == 11
    assert "### 1 kernel spills\n\n| a | b |" in markdown(found)
    assert "<details><summary>the same</summary>" in markdown(found)


def test_reports(tmp_path, capsys):
    rows, reason = cells(40), "needs [red] | <b>sm_100</b> @somebody #12 $x$ `y`"
    failing = failed(sweep_row, **GPU, case="case-0")
    object.__setattr__(failing, "reason", reason)
    base = write(tmp_path / "base", rows, seed=0)
    head = write(tmp_path / "head", [failing, *rows[1:]], seed=1, ratios={"case-3": 1.08, "case-5": 0.9})
    assert run(base, head, "--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")) == 12
    said = capsys.readouterr().out
    assert "[red]" in said and "fails: incomplete, performance (exit 12)" in said.replace("\n", " ")

    content = json.loads((tmp_path / "out.json").read_text())
    assert (content["exit_code"], content["failures"]) == (12, ["incomplete", "performance"])
    assert [timing["case"] for timing in content["timings"] if timing["verdict"] == "regression"] == ["case-3"] * 2
    finding, mean = content["findings"][0], content["geometric_means"]["jax.scan"]
    assert finding["detail"] == f"ok → oom: {reason}" and finding["fails"] == "incomplete"
    assert mean["timings"] == 20 and mean["ratio"] == pytest.approx((1.08 * 0.9) ** 0.05, rel=2e-3)

    report = (tmp_path / "out.md").read_text()
    assert report.startswith(MARKER + "\n") and report.count("<details>") == report.count("</details>") == 2
    for title in ("### Regressions (2)", "### Improvements (2)", "### New failures (1)", "### Geometric means (2)"):
        assert title in report
    assert report.index("### Regressions") < report.index("### New failures") < report.index("### Improvements")
    assert r"needs \[red\] \| &lt;b&gt;sm\_100&lt;/b&gt; @&#8203;somebody #&#8203;12 \$x\$ \`y\`" in report
    for line in report.splitlines():
        if line.startswith("| h"):
            assert line.replace(r"\|", "").count("|") in (6, 9)


def test_escape_keeps_one_short_line():
    assert escape("a\nb  c") == "a b c"
    assert len(escape("x" * 1000)) == 300


def test_a_large_report_fits_a_comment(both):
    rows = cells(1000)
    broken = [failed(sweep_row, **GPU, implementation=row.implementation, case=row.case) for row in rows[:700]]
    ratios = {row.case: 1.2 for row in rows[700:900]}
    found = both({"sweep": rows}, {"sweep": broken + rows[700:], "ratios": ratios})
    assert len(found.findings) == 700 and len(found.of("regression")) == 200
    text = markdown(found)
    assert 20_000 < len(text) <= LIMIT
    assert "### Regressions (200)" in text and "### New failures (700)" in text and "more are left out here" in text
    assert text.count("<details>") == text.count("</details>") and "### Geometric means" in text
