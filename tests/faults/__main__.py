"""`python -m tests.faults --case NAME | --all`: faults injected into a running system of real processes and a real Envoy; README.md has the cases.

Exit code 0 if every bound holds, but for those that are known to be later work; 1 if one does not; 2 for a case that there is not.
"""

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path

from .cases import BY_NAME, CASES, Case
from .record import Outcome, Verdict
from .report import markdown, text
from .runner import run_apart, run_inside


def main() -> int:
    arguments = _arguments()
    if arguments.list and not arguments.markdown:
        for case in CASES:
            marks = [mark for mark, holds in (("short", case.is_short), ("root", case.layout.needs_root), ("known", case.known)) if holds]
            print(f"{case.name:32} {case.what}", f"({', '.join(marks)})" if marks else "")
        return 0
    cases = [BY_NAME[name] for name in arguments.case] if arguments.case else list(CASES) if arguments.all else []
    if arguments.inside:
        run_inside(cases[0], arguments.inside, arguments.seconds_scale)
        return 0
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # either way all is taken back
    try:
        outcomes = asyncio.run(_run(cases, arguments))
    except KeyboardInterrupt:
        return 130
    if arguments.markdown:
        print(markdown(outcomes, CASES if arguments.all or arguments.list else cases), end="")
    elif len(cases) > 1:
        failed = [name for name, outcome in outcomes.items() if outcome.verdict is Verdict.FAIL]
        print(f"{len(outcomes)} cases, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    return int(any(outcome.verdict is Verdict.FAIL for outcome in outcomes.values()))


async def _run(cases: list[Case], arguments: argparse.Namespace) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    for case in cases:
        outcomes[case.name] = await run_apart(case, arguments.seconds_scale, arguments.keep)
        if arguments.json:
            print(json.dumps(outcomes[case.name].plain()), flush=True)
        else:
            print(text(case, outcomes[case.name]), file=sys.stderr if arguments.markdown else sys.stdout, flush=True)
    return outcomes


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--case", action="append", choices=[*BY_NAME], metavar="NAME", help="this case; repeatable")
    which.add_argument("--all", action="store_true", help="one after the other")
    which.add_argument("--list", action="store_true", help="what there is")
    parser.add_argument(
        "--seconds-scale", type=float, default=1.0, help="times how long the load runs before and after a fault, and a fault as far as its bounds allow"
    )
    parser.add_argument("--markdown", action="store_true", help="print the README's table at the end, and the rest to standard error")
    parser.add_argument("--json", action="store_true", help="one object per case")
    parser.add_argument("--keep", type=Path, help="a directory that logs and settings are copied to")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # this process is the case's own, and works in that directory
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
