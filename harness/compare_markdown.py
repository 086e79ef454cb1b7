"""A comparison as a comment on a pull request: short at the top, folded below, and under GitHub's size limit.

The first line is an invisible marker, by which a workflow finds its comment to update it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from harness.compare import Comparison
from harness.compare_findings import EXIT_CODES, MEANING, WORSE_ERROR, Finding
from harness.compare_timings import SIGNIFICANCE, Timing, Verdict

MARKER = "<!-- ttt-lab-compare -->"
LIMIT = 65_000  # GitHub refuses 65,536
_LONGEST = 300  # characters of a text in a table


def markdown(found: Comparison) -> str:
    """The report, with as many rows of its tables as fit; what is folded is shortened first."""
    shown = folded = max(1, len(found.timings), len(found.findings), *(len(s.lines) for s in found.sections))
    while len(text := _render(found, shown, folded)) > LIMIT:
        if folded > 5:
            folded //= 2
        elif shown > 0:
            shown //= 2
        else:
            raise ValueError(f"report: expected at most {LIMIT} characters, got {len(text)}")
    return text


def error_markdown(base: str, head: str, message: str) -> str:
    """The report of a comparison that was refused or could not be made."""
    lines = [MARKER, f"## TTT Lab: **harness error** (exit {EXIT_CODES['error']})", _sides(base, head)]
    return "\n\n".join([*lines, f"> {escape(message, 2000)}", _exit_codes()]) + "\n"


def headline(found: Comparison) -> str:
    """The verdict in one line."""
    verdicts: tuple[Verdict, ...] = ("regression", "improvement", "suspect")
    count = {verdict: len(found.of(verdict)) for verdict in verdicts}
    by_kind: dict[str, int] = {}
    for finding in found.findings:
        by_kind[finding.kind] = by_kind.get(finding.kind, 0) + 1
    parts = [f"{number} {name}{'s' if number > 1 else ''}" for name, number in count.items() if number]
    parts += [f"{number} {'cell' if number == 1 else 'cells'} {kind}" for kind, number in by_kind.items()]
    parts += [f"{len(found.damage)} × damaged or missing input"] if found.damage else []
    parts += [section.title for section in found.sections if section.severity != "note"]
    verdict = f"fails: {', '.join(found.failures)} (exit {found.exit_code})" if found.failures else "passes"
    return f"{verdict} — {', '.join(parts) or 'nothing changed'}"


def escape(text: str, longest: int = _LONGEST) -> str:
    """Somebody else's text as text: no markup, links, mentions of people or issues, or ends of table cells."""
    text = " ".join(text.split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]~$|])", r"\\\1", text)
    return re.sub(r"([@#])", r"\1&#8203;", text)  # a zero-width space ends a mention


def _render(found: Comparison, shown: int, folded: int) -> str:
    tested = sum(timing.q is not None for timing in found.timings)
    verdict, _, rest = headline(found).partition(" — ")
    counts = f"{found.matched} rows compared, {found.new} new, {found.failing} failing on both sides"
    parts = [
        MARKER,
        f"## TTT Lab: **{verdict}**\n\n{escape(rest, 1000)}",
        _sides(found.base, found.head),
        f"{counts}; {tested} times tested.",
        _quoted(found.labels, shown),
        _list("Damaged or missing input", found.damage, shown),
        _timings("Regressions", found.of("regression"), shown),
        _timings("Suspect: slower or faster, not shown to be", found.of("suspect"), shown),
        *(_section(section.title, section.lines, shown) for section in found.sections if section.severity != "note"),
        _findings("New failures", [finding for finding in found.findings if finding.fails], shown),
        _timings("Improvements", found.of("improvement"), shown),
        _means(found, shown),
        _fold("Other failures, and what was fixed", _findings("", [f for f in found.findings if not f.fails], folded)),
        *(_fold(s.title, _section("", s.lines, folded)) for s in found.sections if s.severity == "note"),
        _fold(f"All {len(found.timings)} timings", _timings("", found.timings, folded)),
        _fold("How this is judged", _method(found)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sides(base: str, head: str) -> str:
    return f"{escape(base)} → {escape(head)}"


def _method(found: Comparison) -> str:
    settings, floor = found.settings, found.noise_floor
    noise = f"{floor.share:.2%}, the 95th percentile of {floor.pairs} pairs: {floor.source}" if floor else "not known"
    return "\n".join(
        [
            "- Ratios are HEAD over BASE of medians over process-level medians; intervals are a 95 % bootstrap of "
            "processes, then blocks.",
            f"- A regression is slower by more than {settings.threshold:.1%}, its interval excludes 1, and its q "
            f"(Benjamini-Hochberg over all timings, moderated t-test) is at most {SIGNIFICANCE}.",
            f"- Noise floor: {noise}.",
            f"- An error is worse if it is more than {settings.error_ratio_factor:g} times as large, and more than "
            f"{WORSE_ERROR:g} of what is allowed.",
            "",
            _exit_codes(),
        ]
    )


def _exit_codes() -> str:
    rows = [(str(code), name, MEANING[name]) for name, code in EXIT_CODES.items()]
    return _table(("exit code", "fails by", "because of"), [("0", "", "nothing"), *rows], len(rows) + 1)


def _timings(title: str, timings: Sequence[Timing], limit: int) -> str:
    rows = (
        (
            escape(timing.where),
            escape(timing.cell),
            f"{timing.base_ms:.4g}",
            f"{timing.ratio:.3f}",
            f"{timing.low:.3f} to {timing.high:.3f}",
            "" if timing.q is None else f"{timing.q:.2g}",
            "/".join(str(len(blocks)) for blocks in timing.blocks),
            escape("; ".join(filter(None, (timing.verdict if not title else "", timing.note)))),
        )
        for timing in timings
    )
    names = ("device", "cell", "BASE ms", "ratio", "95 % interval", "q", "processes", "note")
    return _titled(title, len(timings), _table(names, rows, limit, len(timings)))


def _findings(title: str, findings: Sequence[Finding], limit: int) -> str:
    rows = (
        (escape(f.where), f.kind, escape(f.cell), escape(_parts(f)), escape(f.detail)) for f in findings
    )
    names = ("device", "what", "cell", "of", "detail")
    return _titled(title, len(findings), _table(names, rows, limit, len(findings)))


def _parts(finding: Finding) -> str:
    more = f" and {len(finding.parts) - 4} more" if len(finding.parts) > 4 else ""
    return ", ".join(finding.parts[:4]) + more


def _means(found: Comparison, limit: int) -> str:
    means = found.geometric_means()
    rows = ((escape(name), f"{mean:.3f}", str(count)) for name, (mean, count) in sorted(means.items()))
    names = ("implementation", "geometric mean ratio", "timings")
    return _titled("Geometric means" if means else "", len(means), _table(names, rows, limit, len(means)))


def _titled(title: str, count: int, table: str) -> str:
    return f"### {title} ({count})\n\n{table}" if title and count else table


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], limit: int, count: int | None = None) -> str:
    rows = list(rows)
    if not rows:
        return ""
    lines = [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows[:limit])]
    return "\n".join(lines) + _left_out(len(rows), limit)


def _section(title: str, lines: Sequence[str], limit: int) -> str:
    text = "\n".join(lines[:limit]) + _left_out(len(lines), limit)
    return f"### {escape(title)}\n\n{text}" if title else text


def _quoted(labels: Sequence[str], limit: int) -> str:
    return "\n>\n".join(f"> ⚠️ {escape(text)}" for text in labels[:limit]) + _left_out(len(labels), limit)


def _list(title: str, texts: Sequence[str], limit: int) -> str:
    if not texts:
        return ""
    lines = "\n".join(f"- {escape(text)}" for text in texts[:limit])
    return f"### {title}\n\n{lines}{_left_out(len(texts), limit)}"


def _left_out(count: int, limit: int) -> str:
    return f"\n\n*{count - limit} more are left out here; the JSON report has all of them.*" if count > limit else ""


def _fold(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n\n{text}\n\n</details>" if text else ""
