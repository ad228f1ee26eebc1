"""A real kubectl, as somebody who may do everything on a cluster. Where there is none, what needs it is skipped."""

import json
import subprocess
from pathlib import Path
from typing import Any

from .assets import asset


class Kubectl:
    """`kubectl("apply", "-f", file)` gives what it says. Raises AssertionError with kubectl's words where it fails."""

    def __init__(self, kubeconfig: str) -> None:
        self.command = [asset("kubectl", Path(kubeconfig).parent), "--kubeconfig", kubeconfig]

    def __call__(self, *arguments: str | Path, stdin: str = "") -> str:
        done = subprocess.run([*self.command, *map(str, arguments)], input=stdin, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"kubectl {' '.join(map(str, arguments))}: {done.stderr}"
        return done.stdout

    def get(self, *arguments: str) -> list[dict[str, Any]]:
        """Objects, as `kubectl get` finds them: one that is named, or all that there are."""
        found = json.loads(self("get", *arguments, "-o", "json"))
        items: list[dict[str, Any]] = found.get("items", [found])
        return items

    def set_status(self, namespace: str, kind: str, name: str, status: dict[str, Any]) -> None:
        """As the controller of that kind."""
        self("-n", namespace, "patch", kind, name, "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))
