"""The report page without a browser: well-formed, self-contained, everything on it, nothing ranked that is wrong."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import html5lib
import pytest
from PIL import Image

from harness import records, report
from harness.command import main
from harness.figures import caption
from harness.leaderboard import leaderboard
from harness.parity_view import matrices
from harness.peer_times import PeerTime
from harness.report_view import command_line, kernels, number
from harness.rows import SweepRow, columns, latest
from tests.report_folder import REASON, fill
from tests.test_records import failed, parity_row, sweep_row

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("h100")
    fill(folder)
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(folder / "speedup_mlp_forward_backward.png")
    report.write(folder)
    return folder


def tree(path: Path):
    """The page's elements; any mistake in its HTML is an error."""
    text = path.read_text(encoding="utf-8")
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)


def texts(element) -> str:
    return " ".join("".join(element.itertext()).split())


def board(page) -> list[list[str]]:
    """The leaderboard's rows as texts, without the heads of the cells."""
    rows = page.findall(".//table[@id='board']/tbody/tr")
    return [[texts(cell) for cell in row] for row in rows if row.get("class") != "cell"]


def test_nothing_on_it_comes_from_elsewhere(folder):
    page = tree(folder / report.NAME)
    links = [value for element in page.iter() for name, value in element.items() if name in ("href", "src")]
    assert links
    assert {re.match(r"#|data:", link) is not None for link in links} == {True}
    source = (folder / report.NAME).read_text()
    assert not re.search(r"https?://|@import|url\(", re.sub(r"data:[^\"]*", "", source))
    assert not page.findall(".//link[@rel='stylesheet']")


def test_every_timing_is_a_row_and_only_what_is_right_has_a_rank_and_a_time(folder):
    rows = board(tree(folder / report.NAME))
    assert len(rows) == 8 * 7
    assert [row[:3] + row[4:5] for row in rows[:4]] == [
        ["1", "triton.fast", "0.500", "80.0×"],
        ["2", "jax.scan", "2.00", "20.0×"],
        ["3", "torch.compile", "10.0", "4.00×"],
        ["4", "torch.eager", "40.0", "1.00×"],
    ]
    assert rows[4:7] == [
        ["–", "mine.large", "oom 40 GiB, asked for 80"],
        ["–", "mine.wrong", f"wrong {REASON}"],
        ["–", "cuda.none", "unsupported 40 GiB, asked for 80"],
    ]


def test_each_column_says_what_the_row_holds(folder):
    page = tree(folder / report.NAME)
    heads = [texts(head) for head in page.findall(".//table[@id='board']/thead/tr/th")]
    rows = {row[1]: dict(zip(heads, row, strict=True)) for row in board(page)[:4]}
    kernels = "22 x void gemm<float, 4>(a&b)1 x copy"
    values = {"roofline": "10.0 %", "latency floor, ms": "0.200", "host, ms": "1.00", "launches": kernels}
    values |= {"p20–p80, ms": "0.450–0.550", "first call, s": "1.50", "peak memory, MiB": "1,024", "timer": "cupti"}
    values |= {"error ratio": "0.500", "throttled": "no", "SM clock, MHz": "1755 412 W", "samples": "60 in 2"}
    assert {name: rows["triton.fast"][name] for name in values} == values
    assert rows["torch.compile"]["throttled"] == "yes: sw_power_cap"
    absent = set(values) - {"timer", "error ratio"}
    assert {rows["torch.eager"][name] for name in absent} == {"–"}


def test_reasons_are_text_never_markup(folder):
    page = tree(folder / report.NAME)
    assert len(page.findall(".//script")) == 2
    shown = [texts(row) for row in page.findall(".//table[@class='failures']/tbody/tr")]
    assert len(shown) == 2 + 16
    assert sum(REASON in text for text in shown) == 2 + 8
    data = json.loads(page.find(".//script[@id='data']").text)
    assert sum(REASON in row for row in data["parity"]) == 2


def test_data_of_the_script_is_in_the_order_of_the_rows(folder):
    page = tree(folder / report.NAME)
    data = json.loads(page.find(".//script[@id='data']").text)
    rows = [dict(zip(data["sweep"]["names"], row, strict=True)) for row in data["sweep"]["rows"]]
    assert [row["implementation"] for row in rows] == [row[1] for row in board(page)]
    assert [str(row["rank"] or "–") for row in rows] == [row[0] for row in board(page)]
    assert len(data["parity"]) == 15
    assert [row[5] for row in data["parity"][:2]] == ["wrong", "wrong"]


def test_counts_unsupported_and_environment(folder):
    page = tree(folder / report.NAME)
    counts = [texts(part) for part in page.findall(".//dl[@class='counts']/div")]
    assert counts == [
        "parity 12 right 2 wrong 0 failed 1 unsupported of 15 tensors",
        "sweep 32 right 8 wrong 8 failed 8 unsupported of 56 timings",
    ]
    row = page.find(".//details[@id='unsupported']//tbody/tr")
    assert [texts(cell) for cell in row] == ["cuda.none", "1", "8", "40 GiB, asked for 80"]
    assert texts(page.find(".//pre")).endswith(
        "python -m harness sweep --implementations jax,torch --fresh --seed 0 "
        f"python -m harness report results/{folder.name}"
    )


def test_plots_are_embedded_with_what_they_show(folder):
    image = tree(folder / report.NAME).find(".//figure/img")
    assert image.get("src").startswith("data:image/png;base64,")
    assert (image.get("width"), image.get("height")) == ("40", "20")
    assert "TTT mlp, forward and backward" in image.get("alt")
    assert caption("timer_proof") == "timer proof"


def test_a_matrix_cell_is_as_bad_as_the_worst_of_its_rows(folder):
    by_tensor, by_case = matrices(folder)
    lines = {line.implementation: [cell.text for cell in line.cells] for line in by_tensor.lines}
    assert by_tensor.labels == ["out", "d_xq", "d_lr"]
    assert lines["jax.scan"] == ["0.05", "0.30", "0.90"]
    assert lines["mine.wrong"] == ["✗ 2.00", "✗ NaN", "–"]
    assert {line.implementation: line.unsupported for line in by_case.lines}["cuda.none"] == "40 GiB, asked for 80"
    assert {line.implementation: line.cells[0].kind for line in by_case.lines}["mine.wrong"] == "wrong"


def test_a_case_without_a_result_is_told_from_a_wrong_one(tmp_path):
    rows = [parity_row(error_ratio=0.3), failed(parity_row, case="lm-1.3b", tensor="")]
    records.append(tmp_path / "parity.csv", rows)
    by_tensor, by_case = matrices(tmp_path)
    assert [(cell.kind, cell.text) for cell in by_tensor.lines[0].cells] == [("failed", "! 0.30 oom")]
    assert [(cell.kind, cell.text) for cell in by_case.lines[0].cells] == [("failed", "! oom"), ("ok", "0.30")]


def test_the_same_folder_gives_the_same_bytes(folder, tmp_path):
    again = tmp_path / folder.name
    shutil.copytree(folder, again)
    assert report.write(again).read_bytes() == (folder / report.NAME).read_bytes()


def test_times_of_different_gpus_or_of_an_unknown_timer_are_not_set_against_each_other():
    fast = sweep_row(implementation="torch.eager", timer="cupti", gpu="H100")
    for other in ({"gpu": "H200"}, {"timer": "stopwatch"}):
        cell = leaderboard([fast, replace(fast, implementation="jax.scan", **other)], "torch.eager")[0]
        assert [(entry.rank, entry.ratio) for entry in cell.entries] == [(None, None)] * 2
        assert cell.note.startswith("not ranked, no ratios: measured with cupti on H100, ")


def test_a_time_by_the_hosts_clock_is_ranked_as_an_upper_bound():
    fast = sweep_row(implementation="torch.eager", timer="cupti", gpu="H100")
    cell = leaderboard([fast, replace(fast, implementation="jax.scan", timer="host_sync")], "torch.eager")[0]
    assert [(entry.rank, entry.ratio) for entry in cell.entries] == [(1, 1.0), (2, 1.0)]
    assert cell.note == "times by host_sync have the host's share in them: on the device at most that"


def test_times_from_two_environments_are_told():
    fast = sweep_row(implementation="torch.eager", timer="cupti", gpu="H100")
    cell = leaderboard([fast, replace(fast, implementation="jax.scan", fingerprint="other")], "torch.eager")[0]
    assert [(entry.rank, entry.ratio) for entry in cell.entries] == [(1, 1.0), (2, 1.0)]
    assert cell.note == "times from 2 environments (driver or package versions)"


def test_what_is_not_the_same_problem_is_another_cell():
    base = sweep_row()
    changes = ({"tokens": 128}, {"causal": False}, {"cache": "warm"}, {"matmul_precision": "tf32"}, {"dtype": "bf16"})
    cells = leaderboard([base, *(replace(base, **change) for change in changes)], "torch.eager")
    assert len(cells) == 6
    assert {entry.rank for cell in cells for entry in cell.entries} == {1}


@pytest.mark.parametrize(("device", "banners"), [("cpu", 2), ("cuda", 0)])
def test_cpu_times_carry_a_banner(tmp_path, device, banners):
    fill(tmp_path, device)
    page = tree(report.write(tmp_path))
    found = [texts(part) for part in page.findall(".//p[@class='banner']")]
    assert found == ["CPU times show that things work; no performance claim."] * banners


@pytest.mark.parametrize("name", ["parity.csv", "sweep.csv"])
def test_a_folder_with_one_of_the_two_and_nothing_else(folder, tmp_path, name):
    shutil.copy(folder / name, tmp_path)
    page = tree(report.write(tmp_path))
    assert bool(board(page)) is (name == "sweep.csv")
    assert "No environment.json." in texts(page)


def test_only_failed_rows_and_none_at_all(tmp_path):
    (tmp_path / "sweep.csv").write_text(",".join(columns(SweepRow)) + "\n")
    assert not board(tree(report.write(tmp_path)))
    records.append(tmp_path / "sweep.csv", [failed(sweep_row)])
    assert board(tree(report.write(tmp_path))) == [["–", "torch.eager", "oom 40 GiB, asked for 80"]]


def test_the_command_draws_and_writes(folder, tmp_path, capsys):
    target = tmp_path / "h100"
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.png", "*.html"))
    assert main(["report", str(target), "--baseline", "jax.scan"]) == 0
    assert capsys.readouterr().out.strip().replace("\n", "") == str(target / "index.html")
    page = tree(target / "index.html")
    assert len(page.findall(".//figure")) == len(list(target.glob("*.png"))) == 10
    assert (target / "index.html").stat().st_size < 3_000_000
    assert [row[4] for row in board(page)[:4]] == ["4.00×", "1.00×", "0.200×", "0.0500×"]


def test_peers_have_their_time_and_verdict_and_how_far_they_are_from_the_fastest_right_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "p")
    page = report.write(tmp_path / "p")
    assert 'id="peers"' not in page.read_text()
    names = {each.name for each in fields(PeerTime)}
    common = {name: value for name, value in asdict(sweep_row()).items() if name in names}
    wrong = {"verdict": "wrong", "reason": REASON, "error_ratio": 5.85}
    rows = [
        PeerTime(**common | wrong | {"implementation": "peer.fla_chunk", "device_ms": 0.42}),
        PeerTime(**common | wrong | {"implementation": "peer.fla_fused_chunk", "device_ms": 0.40}),
        PeerTime(**common | {"implementation": "cuda.cupy", "device_ms": 0.1, "verdict": "ok", "error_ratio": 0.9}),
        PeerTime(**common | wrong | {"implementation": "peer.ttt_tk", "pass_": "forward_backward", "device_ms": 9.0}),
        PeerTime(**common | wrong | {"implementation": "peer.none", "device_ms": None, "untimed": "oom: no memory"}),
    ]
    records.append(tmp_path / "p" / "peer_times.csv", rows)
    found = tree(report.write(tmp_path / "p")).find(".//section[@id='peers']")
    lines = [["".join(cell.itertext()) for cell in line] for line in found.iterfind(".//tbody/tr")]
    assert [line[3:6] for line in lines] == [
        ["cuda.cupy", "0.100", "1.00×"],
        ["peer.fla_fused_chunk", "0.400", "4.00×"],
        ["peer.fla_chunk", "0.420", "4.20×"],
        ["peer.ttt_tk", "9.00", "–"],
    ]
    assert [line[7] for line in lines] == ["ok", "wrong", "wrong", "wrong"] and lines[1][10] == REASON


def test_a_baseline_without_a_time_is_replaced_by_the_same_one_on_page_and_plots(folder, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr("harness.report.plots.sweep_plots", lambda folder, baseline: drawn.append(baseline))
    shutil.copy(folder / "sweep.csv", tmp_path)
    assert main(["report", str(tmp_path), "--baseline", "mine.wrong"]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert f"mine.wrong has no time in {tmp_path}: speed-ups are over jax.scan" in said
    page = (tmp_path / "index.html").read_text()
    assert drawn == ["jax.scan"] and '<option selected>jax.scan' in page.replace('value="jax.scan" ', "")


def test_the_baseline_is_that_of_the_folders_sweep_unless_told(folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("harness.report.plots.sweep_plots", lambda folder, baseline: drawn.append(baseline))
    shutil.copytree(folder, tmp_path / "s")
    machine = json.loads((tmp_path / "s" / "environment.json").read_text())
    assert main(["report", str(tmp_path / "s")]) == 0
    machine["arguments"]["baseline"] = "jax.scan"
    (tmp_path / "s" / "environment.json").write_text(json.dumps(machine))
    assert main(["report", str(tmp_path / "s")]) == 0
    assert main(["report", str(tmp_path / "s"), "--baseline", "triton.fast"]) == 0
    assert drawn == ["torch.eager", "jax.scan", "triton.fast"]


def test_an_unknown_baseline_lists_the_valid_ones_and_draws_nothing(folder, tmp_path, capsys):
    shutil.copy(folder / "sweep.csv", tmp_path)
    assert main(["report", str(tmp_path), "--baseline", "triton.fist"]) == 2
    assert "unknown baseline 'triton.fist' (did you mean triton.fast?)" in capsys.readouterr().out.replace("\n", "")
    assert not (tmp_path / report.NAME).exists() and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", "expected parity.csv or sweep.csv in it, found neither"),
        ("environment.json", "{", "environment.json: expected JSON"),
        ("environment.json", "[]", "environment.json: expected a JSON object, got list"),
        ("plot.png", "text", "plot.png: expected a PNG image"),
        ("parity.csv", "a,b\n1,2\n", "parity.csv: columns missing"),
    ],
)
def test_a_folder_that_cannot_be_read(tmp_path, name, content, message):
    if name:
        records.append(tmp_path / "sweep.csv", [sweep_row()])
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        report.write(tmp_path)


def test_numbers_keep_three_digits_and_no_exponent():
    numbers = [None, 0.0, 0.05123, 5.123, 51.23, 512.3, 5123.0, float("nan"), float("inf")]
    assert [number(value) for value in numbers] == ["–", "0", "0.0512", "5.12", "51.2", "512", "5,123", "NaN", "inf"]


def test_measured_ceilings_are_shown(folder, tmp_path):
    shutil.copy(folder / "sweep.csv", tmp_path)
    ceilings = {"copy_bytes_per_s": 2.951e12, "matmul_flops_per_s": {"bf16": 7e14}}
    (tmp_path / "ceilings.json").write_text(json.dumps(ceilings))
    rows = tree(report.write(tmp_path)).findall(".//table[@class='pairs']//tr")
    shown = [[texts(cell) for cell in row] for row in rows]
    assert shown == [["copy_bytes_per_s", "2.95 T"], ["matmul_flops_per_s.bf16", "700.00 T"]]


def test_long_lists_of_kernels_are_cut():
    assert kernels("2 x a; 1 x b") == ["2 x a", "1 x b"]
    assert kernels("1 x " + "k" * 200 + "; b" * 9)[0] == "1 x " + "k" * 95 + "…"
    assert kernels("a" + "; b" * 9)[5:] == ["b", "and 4 more in sweep.csv"]


def test_the_command_line_can_be_typed():
    arguments = {"command": "sweep", "cases": ["a b", "c"], "fresh": False, "git_sha": "abc", "timeout": 2.0}
    assert command_line({"arguments": arguments}) == "python -m harness sweep --cases 'a b,c' --timeout 2.0"
    assert command_line({}) == ""


def test_committed_results_render(tmp_path):
    folders = [path.parent for path in (ROOT / "results").glob("*/environment.json") if "cpu" not in path.parent.name]
    assert folders
    for folder in folders:
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        page = report.write(copy)
        assert len(board(tree(page))) == len(latest(records.load(copy / "sweep.csv", SweepRow)))
        assert page.stat().st_size < 4_000_000

