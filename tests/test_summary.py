"""What the terminal shows of result rows, on a terminal of 100 columns."""

from __future__ import annotations

import pytest
from rich.console import Console, RenderableType

from harness import summary
from tests.test_records import failed, parity_row, sweep_row

KEYS = ("torch.eager", "torch.autograd", "torch.compile", "jax.scan", "jax.autodiff")


def rendered(table: RenderableType) -> list[str]:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_parity_takes_two_lines_an_implementation():
    rows = [
        parity_row(implementation=key, dtype=dtype, tensor=tensor, error_ratio=ratio, case="tiny")
        for key in KEYS
        for dtype in ("fp64", "fp32", "bf16", "fp16")
        for tensor, ratio in (*((f"t{i}", 0.5) for i in range(531)), ("d_w1", 0.76))
    ]
    lines = rendered(summary.parity_table(rows))
    assert len(lines) == 3 + 2 * len(KEYS)
    for key, first, second in zip(KEYS, lines[3::2], lines[4::2], strict=True):
        assert first.split() == [key, *(4 * ["532/532", "worst", "0.76"])]
        assert second.split() == 4 * ["d_w1", "linear", "tiny"]


def test_a_reason_is_text_and_not_markup():
    row = failed(parity_row, "unsupported", implementation="mine.fast", tensor="")
    object.__setattr__(row, "reason", "[red]needs [/] sm_90a")
    assert "[red]needs [/] sm_90a" in rendered(summary.parity_table([row]))[-1]


@pytest.mark.parametrize("ratio", [float("nan"), None])
@pytest.mark.parametrize("first", [True, False])
def test_no_number_is_the_worst(ratio, first):
    bad = failed(parity_row, "wrong", tensor="d_w1")
    object.__setattr__(bad, "error_ratio", ratio)
    other = failed(parity_row, "wrong", tensor="d_xk")
    object.__setattr__(other, "error_ratio", 7.0)
    rows = [bad, other] if first else [other, bad]
    cell = rendered(summary.parity_table(rows))
    assert "0/2" in cell[-2] and ("nan" in cell[-2] or "worst wrong" in cell[-2]) and "d_w1" in cell[-1]


def test_sweep_shows_every_number_and_names_what_did_not_run_once():
    names = "lm-1.3b-small:T=256,M=64", "video-5b-small"
    rows = [
        sweep_row(implementation=key, case=case, pass_=pass_, device_ms=1.5 if key == KEYS[0] else 12.34)
        for key in KEYS
        for case in names
        for pass_ in ("forward", "backward", "forward_backward")
    ]
    rows += [failed(sweep_row, "unsupported", implementation=key, case=names[0]) for key in ("cuda.a", "triton.b")]
    rows += [failed(sweep_row, "oom", implementation="jax.scan", case=names[0])]
    lines = rendered(summary.sweep_table(rows, "torch.eager"))
    text = "\n".join(lines)
    assert "…" not in text and "cuda." not in text and "triton." not in text and "oom" in text
    assert text.count("0.12x") == text.count("12.3") == 4 * 6 - 1 and text.count("1.00x") == 6
    assert [text.count(name) for name in ("fwd+bwd", "lm-1.3b-small ", " T=256,M=64 ", names[1])] == [2, 3, 3, 3]
    assert list(summary.sweep_notes(rows)) == ["unsupported: cuda.a, triton.b (40 GiB, asked for 80)"]
    assert not list(summary.sweep_notes(rows[:3]))
    hot = [sweep_row(throttled=True, throttle_reasons="power cap"), sweep_row(throttled=False)]
    assert list(summary.sweep_notes(hot)) == ["throttled: 1 of 2 times, the clock was held back by power cap"]
