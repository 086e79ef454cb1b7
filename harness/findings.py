"""`python -m harness findings`: reproduce what is known to be wrong in public TTT code, and write `docs/findings.md`.

What was measured is kept in `docs/findings.json`, so that what needs another machine stays as it was measured there;
the page is made from it and from `findings_list`. Each reproduction, a function of `findings_runs`, has a process of
its own.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from harness import environment, findings_runs
from harness.findings_list import FINDINGS, INTRODUCTION, NOT_RUN, Finding
from implementations.registry import Device, unknown

FOLDER = environment.ROOT / "docs"
console = Console(stderr=False)


def add_parser(commands: Any) -> None:
    """Add the command `findings`."""
    command = commands.add_parser("findings", help="reproduce faults of public TTT code, and write docs/findings.md")
    command.add_argument("names", nargs="*", metavar="NAME", help="default: all that this machine can run")
    command.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help="default: docs")
    command.add_argument("--page-only", action="store_true", help="write the page again, from what was measured")
    command.add_argument("--git-sha", metavar="SHA", help="the commit, where the tree is a copy without .git")
    command.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Reproduce, keep, write the page; 1 if one did not reproduce, or was named and cannot run here."""
    device = environment.find_device()
    chosen = _chosen(options.names)
    if options.page_only:
        chosen = []
    left_out = {finding.name: why for finding in chosen if (why := cannot_run(finding, device))}
    for why in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name in left_out if left_out[name] == why)
        what = "cannot run here" if options.names else "left out"
        console.print(f"{what}: {names}: {why}", markup=False, highlight=False, soft_wrap=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.folder / "findings.json"
    measured: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    failed = list(left_out) if options.names else []
    for finding in chosen:
        if finding.name in left_out:
            continue
        found, error = reproduce(finding)
        console.print(f"{finding.name}: {error or found}", markup=False, highlight=False, soft_wrap=True)
        if error:
            failed.append(finding.name)
            continue
        stamp = environment.stamp(device, options.git_sha)
        measured[finding.name] = {
            "found": found,
            "machine": stamp.gpu,
            "versions": " ".join(filter(None, (stamp.versions, findings_runs.versions(finding.packages)))),
            "git_sha": stamp.git_sha,
            "started_at": stamp.started_at,
        }
        _keep(measured, kept)
    _keep(measured, kept)
    page = options.folder / "findings.md"
    page.write_text(render(FINDINGS, measured), encoding="utf-8")
    console.print(f"  {page}", highlight=False, soft_wrap=True)
    return 1 if failed else 0


def _keep(measured: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(dict(sorted(measured.items())), indent=2) + "\n", encoding="utf-8")


def _chosen(names: Sequence[str]) -> list[Finding]:
    known = {finding.name: finding for finding in FINDINGS}
    for name in names:
        if name not in known:
            raise ValueError(unknown("finding", name, known))
    return [known[name] for name in names] or list(FINDINGS)


def cannot_run(finding: Finding, device: Device) -> str | None:
    """Why this machine cannot reproduce it, or None."""
    if finding.needs == "h100" and device != "cuda":
        return "needs an H100"
    for package in finding.packages:
        if not findings_runs.versions([package]):
            return f'{package} is not installed: pip install ".[peers]"'
    return None


def reproduce(finding: Finding) -> tuple[dict[str, Any], str | None]:
    """What its function measures, and why it did not if it did not."""
    command = [sys.executable, "-m", "harness.findings_runs", finding.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=environment.ROOT)
    lines = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
    if done.returncode != 0 or not lines:
        # An exception may have lines of advice behind it.
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return {}, f"did not run (exit code {done.returncode}): {[*lines, *errors][-1] if lines else 'no output'}"
    return json.loads(lines[-1]), None


def render(findings: Sequence[Finding], measured: Mapping[str, Any]) -> str:
    """The page, from what was measured, where it was."""
    parts = ["# Findings in public TTT code", INTRODUCTION]
    for project in dict.fromkeys(finding.project for finding in findings):
        parts.append(f"## {project}")
        for finding in (f for f in findings if f.project == project):
            parts += _section(finding, measured.get(finding.name))
    helpers: list[Callable[..., Any]] = [findings_runs.worst, findings_runs._error, findings_runs._fla_inputs]
    parts += ["## What that code calls", *map(_source, helpers)]
    parts += ["## Read, and not run through this lab", NOT_RUN]
    return "\n\n".join(parts) + "\n"


def _section(finding: Finding, entry: Mapping[str, Any] | None) -> list[str]:
    parts = [f"### {finding.title}", finding.text]
    if entry:
        rows = "\n".join(f"| {what} | {_text(value)} |" for what, value in entry["found"].items())
        parts.append(f"| measured | |\n|---|---|\n{rows}")
        when = entry["started_at"].partition("T")[0]
        parts.append(f"On {entry['machine']}, {when}, with {entry['versions']}.")
    else:
        where = "an H100" if finding.needs == "h100" else "nothing special"
        parts.append(f"Not measured yet: it needs {where}.")
    parts.append(f"To reproduce: `python -m harness findings {finding.name}`, which calls")
    parts.append(_source(findings_runs.RUNS[finding.name]))
    return parts


def _source(function: Callable[..., Any]) -> str:
    return f"```python\n{inspect.getsource(function).rstrip()}\n```"


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")
