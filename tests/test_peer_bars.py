"""The peers' own tests as cases here: whose numbers they are, and what passes them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness import bench
from harness.peer_bars import FLA_CASES, FLA_RATIOS, TK_CASE, over_the_bar, verdicts
from spec.cases import draw
from tests import toy

SMALL = FLA_CASES[0]


def test_the_numbers_are_those_of_their_tests():
    case = replace(SMALL, batch=2, tokens=512)
    inputs, _ = draw(case, case.problem("linear", "fp32"))
    assert np.allclose(np.linalg.norm(inputs.xk, axis=-1), 1, atol=1e-5)
    assert 0.9 < inputs.w1.std() < 1.1
    assert 0.7 < inputs.ln_weight.std() < 1.3 and abs(inputs.ln_weight.mean()) < 0.4
    eta = inputs.token_eta[None, :] * inputs.lr.reshape(-1, 16)
    assert 2e-3 < eta.std() < 1e-2 and (eta < 0).any()
    inputs, _ = draw(TK_CASE, TK_CASE.problem("mlp", "bf16"))
    assert (inputs.xv == 1).all() and (inputs.ln_weight == 1).all()


def test_the_yardstick_passes_their_bar_and_ours():
    assert verdicts("torch.eager", SMALL, "cpu") == ([], "")


def test_the_case_of_ttt_tk_has_our_rule_alone(monkeypatch):
    small = replace(TK_CASE, tokens=128, heads=1)
    monkeypatch.setattr("harness.peer_bars.TK_CASE", small)
    assert verdicts("torch.autograd", small, "cpu") == ([], "")
    assert verdicts("cuda.cupy_linear_split", small, "cpu") == ([], "unsupported: has no mlp inner model")


def test_what_is_wrong_by_one_percent_fails_theirs_too():
    rows = bench.check((toy.wrong_forward, toy.backward), SMALL, dtype="fp16", device="cpu")
    lines = over_the_bar(rows)
    assert len(lines) == 1 and lines[0].startswith(f"{SMALL.name} out: RMS error 0.0") and "bar is 0.005" in lines[0]


def test_what_did_not_run_does_not_pass():
    rows = bench.check("peer.fla_chunk", SMALL, dtype="fp16", device="cpu")
    assert over_the_bar(rows) == [f"{SMALL.name} peer.fla_chunk: unsupported: does not run on cpu"]


@pytest.mark.parametrize("tensor", ["out", "final_w1", "final_b1", "d_xq", "d_lr", "d_token_eta", "d_b1"])
def test_every_tensor_has_a_bar(tensor):
    assert 0 < FLA_RATIOS[tensor] <= 0.03
