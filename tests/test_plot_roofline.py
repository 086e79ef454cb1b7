"""Rooflines and bounds: drawn of times from a GPU alone, under the ceilings of the folder, from CSV files alone."""

import json

import pytest
from matplotlib.figure import Figure

from harness import plots, records
from harness.plot_roofline import read_ceilings
from tests.test_plots import PNG
from tests.test_records import failed, sweep_row

WORK = {"flops": 8 * 10**9, "bytes_min": 10**8, "device": "cuda", "dtype": "bf16"}
BOUNDS = {"roofline_ms": 0.05, "latency_floor_ms": 0.2}
CEILINGS = {"copy_bytes_per_s": 3e12, "matmul_flops_per_s": {"bf16": 6e14, "fp32": 5e13, "tf32": 4e14}}
ZERO = json.dumps(CEILINGS | {"copy_bytes_per_s": 0})


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw these rows' plots: the figures of the speed of light by file name."""
    figures = {}
    genuine = Figure.savefig

    def save(figure, path, **options):
        figures[path.name] = figure
        genuine(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", save)

    def draw(*rows, ceilings=CEILINGS):
        records.append(tmp_path / "sweep.csv", rows)
        if ceilings:
            (tmp_path / "ceilings.json").write_text(json.dumps(ceilings))
        written = [path for path in plots.sweep_plots(tmp_path) if path.name.startswith(("roofline", "bounds"))]
        assert all(path.read_bytes().startswith(PNG) for path in written)
        return {path.name: figures[path.name] for path in written}

    return draw


def texts(axes):
    return [text.get_text().strip() for text in axes.texts]


def points(axes):
    """(x, y) of every marker, rounded."""
    return {
        (float(f"{x:.3g}"), float(f"{y:.3g}"))
        for line in axes.lines
        if line.get_marker() not in ("None", "|")
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }


def test_points_lie_where_work_and_time_say(drawn):
    row, slow = sweep_row(**WORK, device_ms=0.1), sweep_row(**WORK, device_ms=1.0, implementation="jax.scan")
    axes = drawn(row, slow)["roofline_linear.png"].axes[0]
    assert points(axes) == {(80, 8e13), (80, 8e12)}
    assert texts(axes) == ["slope: copy 3.00 TB/s", "flat: matmul 600 TFLOP/s"]
    x, y = axes.lines[-1].get_data()
    assert list(zip(x, y, strict=True))[1] == (200, 6e14)  # the ridge
    assert y[0] == pytest.approx(3e12 * x[0])


def test_each_precision_has_its_own_roof(drawn):
    rows = [sweep_row(**WORK), sweep_row(**WORK | {"dtype": "fp32"}), sweep_row(**WORK | {"dtype": "fp16"})]
    rows.append(sweep_row(**WORK | {"dtype": "fp32"}, matmul_precision="tf32"))
    panels = drawn(*rows)["roofline_linear.png"].axes
    flat = {axes.get_title(): texts(axes)[1:] for axes in panels}
    assert flat == {
        "fp32, forward": ["flat: matmul 50 TFLOP/s"],
        "fp32 (tf32), forward": ["flat: matmul 400 TFLOP/s"],
        "bf16, forward": ["flat: matmul 600 TFLOP/s"],
        "fp16, forward": [],
    }


def test_without_ceilings_no_roofs_and_it_says_so(drawn):
    figure = drawn(sweep_row(**WORK), ceilings=None)["roofline_linear.png"]
    assert "no roofs: the folder has no ceilings.json" in figure.get_suptitle()
    assert texts(figure.axes[0]) == []


def test_ceilings_of_another_environment_are_told(drawn):
    own, other = CEILINGS | {"fingerprint": "0123456789ab"}, CEILINGS | {"fingerprint": "fedcba987654"}
    row = sweep_row(**WORK)
    assert "another environment" not in drawn(row, ceilings=own)["roofline_linear.png"].get_suptitle()
    assert "another environment" in drawn(row, ceilings=other)["roofline_linear.png"].get_suptitle()


def test_times_are_over_the_larger_bound(drawn):
    row = sweep_row(**WORK, **BOUNDS, device_ms=1.0)
    mlp = sweep_row(**WORK | {"inner_model": "mlp"}, roofline_ms=0.4, device_ms=1.0)
    figures = drawn(row, mlp)
    axes = figures["bounds_linear.png"].axes[0]
    assert points(axes) == {(5, 0)}
    assert texts(axes) == ["latency floor 0.2, roofline 0.05 ms"]
    assert points(figures["bounds_mlp.png"].axes[0]) == {(2.5, 0)}


@pytest.mark.parametrize(
    "row",
    [
        sweep_row(**WORK | {"device": "cpu"}, **BOUNDS),
        failed(sweep_row, **WORK, **BOUNDS),
        sweep_row(device="cuda"),
    ],
)
def test_nothing_to_draw(drawn, row):
    assert drawn(row) == {}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"copy_bytes_per_s": null, "matmul_flops_per_s": {}}', ZERO])
def test_ceilings_that_cannot_be_read(tmp_path, content):
    (tmp_path / "ceilings.json").write_text(content)
    with pytest.raises(ValueError, match=r"ceilings.json: expected copy_bytes_per_s and matmul_flops_per_s"):
        read_ceilings(tmp_path)
