"""Plots are written from CSV files alone, whatever is missing, failed or absurd in them."""

import pytest

from harness import parity_view, plots, records
from harness.plot_style import styles
from harness.rows import SweepRow, columns
from tests.test_records import failed, parity_row, sweep_row

PNG = b"\x89PNG\r\n"
NAMES = ["torch.eager", "torch.compile", "jax.scan"]


def fill_parity(folder):
    for name in NAMES:
        for tensor, ratio in (("out", 0.2), ("d_xq", 0.9), ("d_lr", 3.0), ("d_w1", float("nan"))):
            verdict = {} if ratio <= 1 else {"status": "wrong", "reason": "too far off"}
            row = parity_row(implementation=name, tensor=tensor, error_ratio=ratio, **verdict)
            records.append(folder / "parity.csv", [row])
    row = failed(parity_row, "unsupported", implementation="triton.best", tensor="")
    records.append(folder / "parity.csv", [row])


def fill_sweep(folder, device="cpu"):
    for name in NAMES:
        for tokens in (64, 128):
            row = sweep_row(implementation=name, tokens=tokens, device=device, device_ms_p20=0.3, device_ms_p80=0.4)
            records.append(folder / "sweep.csv", [row])
    records.append(folder / "sweep.csv", [failed(sweep_row, implementation="jax.vmap", device=device)])


def check(written, *names):
    assert [path.name for path in written] == list(names)
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 10_000 for path in written)


SWEEP = ["time_vs_tokens_linear_forward.png", "throughput_vs_tokens_linear_forward.png", "speedup_linear_forward.png"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_folder_with_both(tmp_path, device):
    fill_parity(tmp_path)
    fill_sweep(tmp_path, device)
    check(plots.parity_plots(tmp_path) + plots.sweep_plots(tmp_path), "parity_matrix.png", *SWEEP, "error_vs_time.png")


def test_a_folder_with_one_of_the_two(tmp_path):
    (tmp_path / "parity").mkdir()
    fill_parity(tmp_path / "parity")
    check(plots.parity_plots(tmp_path / "parity"), "parity_matrix.png")
    (tmp_path / "sweep").mkdir()
    fill_sweep(tmp_path / "sweep")
    check(plots.sweep_plots(tmp_path / "sweep", baseline="not.there"), *SWEEP, "error_vs_time.png")


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("cuda", False)])
def test_cpu_times_carry_a_note(tmp_path, monkeypatch, device, expected):
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda figure, text, **_: titles.append(text))
    fill_sweep(tmp_path, device)
    plots.sweep_plots(tmp_path)
    assert [("not a performance claim" in title) for title in titles] == [expected] * 4


def test_the_title_counts_failing_cells(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda figure, text, **_: titles.append(text))
    fill_parity(tmp_path)
    plots.parity_plots(tmp_path)
    assert titles == ["Parity with the truth: 6 of 12 cells fail"]


def test_what_failed_before_its_code_changed_is_marked(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda figure, text, **_: titles.append(text))
    wrong = {"status": "wrong", "reason": "too far off", "error_ratio": 3.0}
    before, after = ({"source_hash": name, "started_at": at} for name, at in (("a", "2026-01-01"), ("b", "2026-01-02")))
    for name, of_out, of_d_xq in (("jax.scan", before, after), ("torch.eager", after, before)):
        records.append(tmp_path / "parity.csv", [parity_row(implementation=name, tensor="out", **wrong, **of_out)])
        records.append(tmp_path / "parity.csv", [parity_row(implementation=name, tensor="d_xq", **of_d_xq)])
    plots.parity_plots(tmp_path)
    assert titles == ["Parity with the truth: 2 of 4 cells fail; 1* by older code"]
    (by_tensor, _) = parity_view.matrices(tmp_path)
    starred = [[cell.text[-1] == "*" for cell in line.cells] for line in by_tensor.lines]
    assert starred == [[True, False], [False, False]]


def test_what_does_not_repeat_says_so_beside_an_error_that_is_allowed(tmp_path):
    rows = {"out": (0.2, "two runs differ in 3 elements"), "d_xq": (3.0, "too far off")}
    for tensor, (ratio, reason) in rows.items():
        row = parity_row(tensor=tensor, error_ratio=ratio, status="wrong", reason=reason)
        records.append(tmp_path / "parity.csv", [row])
    plots.parity_plots(tmp_path)
    (by_tensor, _) = parity_view.matrices(tmp_path)
    assert [[cell.text for cell in line.cells] for line in by_tensor.lines] == [["✗ 0.20≠", "✗ 3.00"]]


@pytest.mark.parametrize("status", ["unsupported", "oom", "wrong"])
def test_only_failed_rows(tmp_path, status):
    records.append(tmp_path / "parity.csv", [failed(parity_row, status)])
    records.append(tmp_path / "parity.csv", [failed(parity_row, status, tensor="", implementation="jax.scan")])
    records.append(tmp_path / "sweep.csv", [failed(sweep_row, status)])
    written = plots.parity_plots(tmp_path) + plots.sweep_plots(tmp_path)
    check(written, "parity_matrix.png", "speedup_linear_forward.png")


def test_one_case_causal_and_not_are_two_cells(tmp_path):
    for causal in (True, False):
        records.append(tmp_path / "sweep.csv", [sweep_row(causal=causal)])
    check(plots.sweep_plots(tmp_path), "speedup_linear_forward.png", "error_vs_time.png")  # no line at one T


def test_nothing_to_plot(tmp_path):
    with pytest.raises(ValueError, match=r"parity.csv: expected a file with results to plot, no file"):
        plots.parity_plots(tmp_path)
    (tmp_path / "sweep.csv").write_text(",".join(columns(SweepRow)) + "\n")
    with pytest.raises(ValueError, match=r"sweep.csv: expected a file with results to plot, no rows"):
        plots.sweep_plots(tmp_path)


def test_one_style_for_an_implementation_in_all_plots(tmp_path):
    fill_parity(tmp_path)
    fill_sweep(tmp_path)
    found = styles(tmp_path)
    assert list(found) == ["jax.scan", "jax.vmap", "torch.compile", "torch.eager", "triton.best"]
    assert len({tuple(style.values()) for style in found.values()}) == len(found)
