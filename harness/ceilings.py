"""What the device can do at most, measured: copies, matrix products, one dependent step of a chain.

`speed_of_light` holds a time to them: `roofline_ms` is the larger of the fewest bytes over the copy bandwidth and the
matrix products' FLOPs over the rate of a large product in the same precision. `latency_floor_ms` is the length of
the chain: no mini-batch can start before the one in front of it has updated the fast weights.
"""

from __future__ import annotations

import json
import logging
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.device_clock import open_clock
from harness.frameworks import Framework, open_framework
from spec.cost import bytes_min, flops
from spec.problem import InnerModel, Pass, Problem

FILE = "ceilings.json"
CALLS = 20
COPY_BYTES = 2**31
MATRIX = 8192
STEPS = 2000

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ceilings:
    """Medians of `CALLS` calls each, by the device's clock.

    Attributes:
        copy_bytes_per_s: bytes read plus bytes written by a copy of 2 GiB, a second.
        matmul_flops_per_s: of an 8192 x 8192 x 8192 product of random numbers, by dtype, and `tf32`.
        step_latency_us: of one dependent step, microseconds, by `<inner model>-<head dimension>`; see `chain`.
        fingerprint: of the machine; see `harness.environment`.
    """

    copy_bytes_per_s: float
    matmul_flops_per_s: dict[str, float]
    step_latency_us: dict[str, float] = field(default_factory=dict)
    fingerprint: str = ""


def measure(steps: list[tuple[InnerModel, int]], fingerprint: str) -> Ceilings:
    """Measure this process's GPU; `steps` are the inner models and head dimensions whose chains are wanted."""
    framework = open_framework("torch", "cuda")
    return Ceilings(_copy(framework), _products(framework), _steps(framework, steps), fingerprint)


def prepare(steps: list[tuple[InnerModel, int]]) -> None:
    """Compile what `measure` will ask for in this process."""
    _calls(steps)


def save(ceilings: Ceilings, folder: Path) -> None:
    """Write `ceilings.json`."""
    (folder / FILE).write_text(json.dumps(asdict(ceilings), indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> Ceilings | None:
    """What `save` wrote; None where it did not.

    Raises:
        ValueError: the file holds something else.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return Ceilings(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the ceilings of a device: {error}") from None


def roofline_ms(ceilings: Ceilings | None, problem: Problem, pass_: Pass) -> float | None:
    """The shortest time that bytes and FLOPs allow, milliseconds."""
    precision: str = "tf32" if problem.matmul_precision == "tf32" else problem.dtype
    rate = ceilings.matmul_flops_per_s.get(precision) if ceilings else None
    if ceilings is None or rate is None:
        return None
    return 1e3 * max(bytes_min(problem, pass_) / ceilings.copy_bytes_per_s, flops(problem, pass_) / rate)


def latency_floor_ms(ceilings: Ceilings | None, problem: Problem, pass_: Pass) -> float | None:
    """The length of the chain of mini-batches, milliseconds; a backward has one of its own, in reverse."""
    step = ceilings.step_latency_us.get(_step_key(problem.inner_model, problem.head_dim)) if ceilings else None
    chains = {"forward": 1, "backward": 1, "forward_backward": 2}[pass_]
    return None if step is None else chains * problem.mini_batches * step / 1e3


def _copy(framework: Framework) -> float:
    import torch

    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / _median_s(framework, lambda: target.copy_(source))


def _products(framework: Framework) -> dict[str, float]:
    import torch

    def rate(dtype: torch.dtype) -> float:
        a, b = (torch.randn(MATRIX, MATRIX, device="cuda").to(dtype) for _ in range(2))
        return 2 * MATRIX**3 / _median_s(framework, lambda: a @ b)

    plain = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        rates = {"fp64": rate(torch.float64), "fp32": rate(torch.float32)}
        rates |= {"bf16": rate(torch.bfloat16), "fp16": rate(torch.float16)}
        torch.backends.cuda.matmul.allow_tf32 = True
        return rates | {"tf32": rate(torch.float32)}
    finally:
        torch.backends.cuda.matmul.allow_tf32 = plain


def _steps(framework: Framework, steps: list[tuple[InnerModel, int]]) -> dict[str, float]:
    found = {}
    for step, calls in _calls(steps).items():
        try:
            found[_step_key(*step)] = min(_median_s(framework, call) for call in calls) / STEPS * 1e6
        except Exception as error:  # without this floor the sweep is still worth running
            _not_measured(*step, error)
    return found


def _calls(steps: list[tuple[InnerModel, int]]) -> dict[tuple[InnerModel, int], list[Any]]:
    """The chains of each step, called once: what cannot be compiled here is left out."""
    try:
        from harness import chain
    except ImportError as error:
        logger.warning("the latency of a step is not measured: %s", error)
        return {}
    found = {}
    for step in steps:
        try:
            calls = list(chain.calls(*step, STEPS))
            for call in calls:
                call()
        except Exception as error:  # a compiler's
            _not_measured(*step, error)
            continue
        found[step] = calls
    return found


def _not_measured(inner_model: InnerModel, head_dim: int, error: Exception) -> None:
    logger.warning("the latency of a step of %s, D %d, is not measured: %s", inner_model, head_dim, error)


def _step_key(inner_model: InnerModel, head_dim: int) -> str:
    return f"{inner_model}-{head_dim}"


def _median_s(framework: Framework, call: Any) -> float:
    clock = open_clock(framework)
    clock.time([call] * 3)
    return statistics.median(clock.time([call] * CALLS).ms) / 1e3
