"""A results folder with something of everything: for the tests of the report page."""

import json

from harness import records
from tests.test_records import failed, parity_row, sweep_row

REASON = "out: max error <0.02> is \"2\" & more </script><script>alert('x')</script>"
GPU = {"gpu": "NVIDIA H100 80GB HBM3", "timer": "cupti", "device": "cuda", "dtype": "bf16"}
TRUST = {"sm_clock_mhz": 1755.0, "power_w": 412.5, "throttled": False, "samples": 60, "processes": 2}
TIMES = {"jax.scan": 2.0, "torch.eager": 40.0, "triton.fast": 0.5, "torch.compile": 10.0}
CASES = "lm-1.3b", "lm-125m"


def fill(folder, device="cuda"):
    """Two cases x two inner models x two passes, four right and three failing implementations, a NaN, no plots."""
    for case in CASES:
        for inner_model in ("linear", "mlp"):
            for pass_ in ("forward", "forward_backward"):
                cell = {**GPU, "case": case, "inner_model": inner_model, "pass_": pass_, "device": device}
                records.append(folder / "sweep.csv", [_timed(name, ms, cell) for name, ms in TIMES.items()])
                records.append(folder / "sweep.csv", _failing({**cell, "timer": ""}))
    cell = {"dtype": "bf16", "device": device}
    for name in TIMES:
        for tensor, ratio in (("out", 0.05), ("d_xq", 0.3), ("d_lr", 0.9)):
            row = parity_row(implementation=name, tensor=tensor, error_ratio=ratio, **cell)
            records.append(folder / "parity.csv", [row])
    wrong = {**cell, "implementation": "mine.wrong", "status": "wrong", "reason": REASON}
    records.append(folder / "parity.csv", [parity_row(**wrong, tensor="out", error_ratio=2.0)])
    records.append(folder / "parity.csv", [parity_row(**wrong, tensor="d_xq", error_ratio=float("nan"))])
    unsupported = failed(parity_row, "unsupported", implementation="cuda.none", tensor="", **cell)
    records.append(folder / "parity.csv", [unsupported])
    machine = {"gpu": GPU["gpu"], "device": device, "versions": "torch==2 jax==0.10", "git_sha": "abc"}
    machine["arguments"] = {"command": "sweep", "implementations": ["jax", "torch"], "fresh": True, "seed": 0}
    (folder / "environment.json").write_text(json.dumps(machine))


def _timed(name, ms, cell):
    ms *= 3 if cell["pass_"] == "forward_backward" else 1
    work = {"flops": 7 * 10**9, "bytes_min": 140 * 10**6, "roofline_ms": 0.05, "roofline_fraction": 0.05 / ms}
    work |= {"latency_floor_ms": 0.2, "launches": 2, "kernels": "2 x void gemm<float, 4>(a&b); 1 x copy"}
    if name == "torch.eager":  # as from before these columns were filled
        return sweep_row(implementation=name, device_ms=ms, **cell)
    trust = TRUST | ({"throttled": True, "throttle_reasons": "sw_power_cap"} if name == "torch.compile" else {})
    band = {"device_ms_p20": 0.9 * ms, "device_ms_p80": 1.1 * ms, "host_ms": 2 * ms, "first_call_s": 1.5}
    return sweep_row(implementation=name, device_ms=ms, peak_memory_bytes=2**30, **band, **trust, **work, **cell)


def _failing(cell):
    return [
        sweep_row(**cell, implementation="mine.wrong", status="wrong", reason=REASON, error_ratio=2.0, device_ms=None),
        failed(sweep_row, "oom", implementation="mine.large", **cell),
        failed(sweep_row, "unsupported", implementation="cuda.none", **cell),
    ]
