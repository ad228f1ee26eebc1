"""The outcome of cases as text, and as the table of the README."""

from collections.abc import Iterable, Mapping

from .cases import CASES, Case
from .record import Bound, Outcome, Verdict

HEAD = ("| case | what happens | bound | measured |", "| --- | --- | --- | --- |")


def text(case: Case, outcome: Outcome) -> str:
    """Some lines for people."""
    lines = [f"{outcome.verdict:8} {case.name}: {case.what}"]
    if outcome.why:
        return f"{lines[0]}\n           {outcome.why}"
    lines.append(
        f"{outcome.requests} requests, {outcome.failed} failed, {outcome.failed_twice} after one retry; longest {outcome.longest_s:.2f} s, "
        f"recovery {outcome.recovery_s:.1f} s, warm p50 {outcome.warm_p50_ms:.0f} ms, p99 {outcome.warm_p99_ms:.0f} ms; {outcome.stops} stops of the machine; "
        f"{outcome.seconds:.0f} s in all"
    )
    lines += [f"{'  ' if bound['holds'] else 'X '}{bound['text']}: {bound['measured']}" for bound in outcome.bounds]
    lines.append("answers: " + ", ".join(f"{times} x {what}" for what, times in outcome.answers.items()))
    if outcome.figures:
        lines.append("figures: " + ", ".join(f"{name} {value:g}" for name, value in outcome.figures.items()))
    lines += [f"log: {line}" for line in outcome.said]
    if outcome.verdict is Verdict.KNOWN:
        lines.append(f"known: {case.known}")
    return "\n           ".join(lines)


def markdown(outcomes: Mapping[str, Outcome], cases: Iterable[Case] = CASES) -> str:
    """The README's table; without figures for what was not run."""
    return "\n".join([*HEAD, *(_row(case, outcomes.get(case.name)) for case in cases)]) + "\n"


def _row(case: Case, outcome: Outcome | None) -> str:
    bounds = "; ".join(bound.text for bound in _once(case.bounds))
    return f"| `{case.name}` | {case.what} | {bounds}{f' (later: {case.known})' if case.known else ''} | {_measured(outcome)} |"


def _once(bounds: Iterable[Bound]) -> list[Bound]:
    return list({bound.text: bound for bound in bounds}.values())


def _measured(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.why:
        return f"{outcome.verdict}: {outcome.why}"
    own = "".join(f", {name} {value:g}" for name, value in outcome.figures.items())
    return (
        f"**{outcome.verdict}**: {outcome.requests:,} requests, {outcome.failed} failed, {outcome.failed_twice} after a retry, longest {outcome.longest_s:.1f} s, "
        f"recovery {outcome.recovery_s:.1f} s, warm p99 {outcome.warm_p99_ms:.0f} ms{own}"
    )
