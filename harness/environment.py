"""Where and with what a run was made: the stamp on every row, and `environment.json` beside them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from harness.frameworks import versions
from implementations.registry import Device

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stamp:
    """What every row of one run has in common."""

    run_id: str
    device: Device
    gpu: str
    driver: str
    cuda: str
    git_sha: str
    versions: str
    started_at: str

    @property
    def fingerprint(self) -> str:
        """Of what a time depends on beside the source: the device, its driver and the versions of the packages."""
        parts = self.device, self.gpu, self.driver, self.cuda, self.versions
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def stamp(device: Device, git_sha: str | None = None) -> Stamp:
    """The stamp of a run that starts now on `device`; `gpu` is the processor's name on a CPU run.

    `git_sha` names the commit of a tree that is not a checkout.
    """
    now = datetime.now(UTC)
    gpu, driver, cuda = _nvidia() if device == "cuda" else (_processor(), "", "")
    run_id, started_at = f"{now:%Y%m%dT%H%M%S}-{os.getpid()}", f"{now:%FT%TZ}"
    return Stamp(run_id, device, gpu, driver, cuda, git_sha or _git_sha(), versions(), started_at)


def find_device() -> Device:
    """cuda where the driver reports a GPU, else cpu."""
    return "cuda" if _nvidia()[0] else "cpu"


def folder_name(stamp: Stamp) -> str:
    """The short name of `results/<device>/`: h100, rtx-4090, cpu."""
    if stamp.device == "cpu":
        return "cpu"
    name = re.sub(r"nvidia|geforce|\d+\s*gb.*", "", stamp.gpu.lower()).strip()
    return re.sub(r"[^a-z0-9]+", "-", name.removesuffix(" pcie").removesuffix(" sxm")).strip("-") or "cuda"


def save(folder: Path, stamp: Stamp, arguments: dict[str, object]) -> None:
    """Write `environment.json`: everything needed to run it again; `arguments` are those of the command."""
    content = asdict(stamp) | {
        "fingerprint": stamp.fingerprint,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "arguments": {name: value for name, value in arguments.items() if value is not None},
    }
    path = folder / "environment.json"
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def _nvidia() -> tuple[str, str, str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    first = _output(query).partition("\n")[0]
    name, _, driver = first.partition(",")
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", _output(["nvidia-smi"])) if first else None
    return name.strip(), driver.strip(), cuda[1] if cuda else ""


def _git_sha() -> str:
    """The commit, with `-dirty` where files differ from it; empty outside a checkout."""
    return _output(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    return found[1] if found else platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
