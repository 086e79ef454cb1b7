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


def test_only_peers_are_timed_without_being_right():
    entry = replace(STAND_IN, key="torch.mine")
    protocol, settings = sweep.Protocol(1, ("warm",)), Settings(environment.stamp("cpu", "test"))
    with pytest.raises(ValueError, match=r"torch.mine: what is not right has no time; expected peers"):
        list(peer_times.run([Cell(entry, CASE, PROBLEM, PASSES)], [], protocol, settings))
    keys = {cell.entry.key for cell in load("peer-times", {})}
    assert keys == {"peer.fla_chunk", "peer.fla_fused_chunk", "peer.ttt_tk"}


def test_a_row_without_a_time_says_why():
    settings = Settings(environment.stamp("cpu", "test"))
    with pytest.raises(ValueError, match="untimed: expected a reason exactly where there is no time"):
        peer_times._row(Cell(STAND_IN, CASE, PROBLEM, PASSES), "forward", "warm", [], settings, {})
