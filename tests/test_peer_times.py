"""Times of peers: taken whatever the verdict, which stands beside them; of nobody else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness import environment, parity, peer_times, records, sweep
from harness.grid import Cell, load
from harness.parity import Settings
from harness.peer_times import PeerTime
from implementations.registry import Implementation
from spec.cases import CASES

CASE = CASES["size-d16"]
PROBLEM = CASE.problem("linear", "fp32")
STAND_IN = Implementation("peer.stand_in", "torch", {"linear": "implementations.torch.ttt_linear"})
BROKEN = Implementation("peer.broken", "torch", {"linear": "tests.no_such_page"})
ELSEWHERE = Implementation("peer.elsewhere", "torch", {"linear": "implementations.torch.ttt_linear"}, devices=("cuda",))
PASSES = ("forward", "forward_backward")


def test_a_peer_is_timed_whatever_its_verdict_and_what_cannot_run_says_why(tmp_path):
    cells = [Cell(entry, CASE, PROBLEM, PASSES) for entry in (STAND_IN, BROKEN, ELSEWHERE)]
    settings = Settings(environment.stamp("cpu", "test"))
    checked = [row for _, rows in parity.run(parity.with_yardstick(cells[:1]), settings) for row in rows]
    of_peer = [row for row in checked if row.implementation == "peer.stand_in"]
    assert {row.status for row in of_peer} == {"ok"}
    wrong = replace(of_peer[0], status="wrong", reason="out: 5 times", error_ratio=5.0)
    records.append(tmp_path / "parity.csv", [wrong])
    records.append(tmp_path / "parity.csv", of_peer[1:])

    rows = list(peer_times.command(cells, tmp_path, settings))
    assert records.load(tmp_path / peer_times.FILE, PeerTime) == rows
    found = {(row.implementation, row.pass_): row for row in rows}
    assert len(found) == len(rows) == 6
    for pass_ in PASSES:
        timed, broken, elsewhere = (found[entry.key, pass_] for entry in (STAND_IN, BROKEN, ELSEWHERE))
        assert 0 < timed.device_ms_p20 <= timed.device_ms <= timed.device_ms_p80 and timed.samples >= 2
        assert (timed.verdict, timed.reason, timed.error_ratio) == ("wrong", "out: 5 times", 5.0)
        assert broken.verdict == "unchecked" and broken.device_ms is None and "no_such_page" in broken.untimed
        assert elsewhere.untimed == "unsupported: does not run on cpu"
    of_other_code = [replace(row, source_hash="another") for row in of_peer]
    assert peer_times._verdict(sweep.checks_of(of_other_code, cells[0], settings))[0] == "unchecked"
    assert peer_times._verdict(of_peer)[0] == "ok" and peer_times.table(rows).row_count == 6


def test_others_are_timed_beside_a_peer_and_only_if_they_are_right(tmp_path):
    right, wrong = (replace(STAND_IN, key=f"torch.{name}") for name in ("right", "wrong"))
    cells = [Cell(entry, CASE, PROBLEM, ("forward",)) for entry in (STAND_IN, right, wrong)]
    protocol, settings = sweep.Protocol(1, ("warm",)), Settings(environment.stamp("cpu", "test"))
    with pytest.raises(ValueError, match=r"size-d16: expected a peer, peer.\*, to time others beside, got torch.right"):
        list(peer_times.run(cells[1:], [], protocol, settings))
    checked = [row for _, rows in parity.run(parity.with_yardstick(cells), settings) for row in rows]
    fault = {"status": "wrong", "reason": "out: 5 times", "error_ratio": 5.0}
    checked = [replace(row, **fault) if row.implementation == "torch.wrong" else row for row in checked]
    found = {row.implementation: row for row in peer_times.run(cells, checked, protocol, settings)}
    assert found["peer.stand_in"].device_ms > 0 and found["torch.right"].device_ms > 0
    assert found["torch.wrong"].device_ms is None and found["torch.wrong"].untimed == "wrong: out: 5 times"
    unchecked = {row.implementation: row for row in peer_times.run(cells, [], protocol, settings)}
    assert unchecked["peer.stand_in"].device_ms > 0 and unchecked["torch.right"].untimed == "unchecked"
    with pytest.raises(ValueError, match="torch.wrong: what is wrong and no peer has no time"):
        replace(found["torch.wrong"], device_ms=1.0, untimed="")


def test_the_grid_has_the_kernels_that_are_wrong_and_the_fastest_right_ones():
    keys = {cell.entry.key for cell in load("peer-times", {})}
    assert keys == {"peer.fla_chunk", "peer.fla_fused_chunk", "peer.ttt_tk", "triton.best", "cuda.cupy"}


def test_a_row_without_a_time_says_why():
    settings = Settings(environment.stamp("cpu", "test"))
    with pytest.raises(ValueError, match="untimed: expected a reason exactly where there is no time"):
        peer_times._row(Cell(STAND_IN, CASE, PROBLEM, PASSES), "forward", "warm", [], settings, {})
