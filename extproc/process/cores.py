"""How many cores this process may use: those of its CPU set, and no more than its container is given time of."""

import contextlib
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cores(cgroup: Path = _CGROUP) -> int:
    """At least 1. A container on a machine of 64 cores with a limit of two has two."""
    allowed = len(os.sched_getaffinity(0))
    given = _cores_of_quota(cgroup)
    return allowed if given is None else max(1, min(allowed, int(given)))


def _cores_of_quota(cgroup: Path) -> float | None:
    """Of version 2: `cpu.max` has `$MAX $PERIOD`, in microseconds, and `max` where there is no limit. Of version 1: two files, and -1."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us, period_us = (int((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return None if quota_us < 0 else quota_us / period_us
    return None
