"""What `up` says: what it started, requests to try, and one line per request that Envoy has finished."""

import shlex
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from . import demo
from .stack import Stack

_STYLES = {"2": "green", "4": "yellow", "5": "red"}


def say_started(console: Console, stack: Stack) -> None:
    """The table of nodes, and commands to copy."""
    table = Table("node", "endpoint", "stager", Column("directory", overflow="fold"), title=f"Envoy serves on http://{stack.address}", title_justify="left")
    for node in stack.nodes:
        table.add_row(node.name, node.engine, node.stager, str(node.directory))
    console.print(table)
    adapter = demo.NAMES[0] if stack.uses_demo else "org/adapter"
    console.print("Try, in another terminal:", highlight=False)
    for model in (adapter, stack.base_model.served_name):
        body = f'{{"model":"{model}","messages":[{{"role":"user","content":"hi"}}]}}'
        url = f"localhost:{stack.address.rpartition(':')[2]}/v1/chat/completions"
        console.print(f"  curl {url} -H 'content-type: application/json' -d {shlex.quote(body)}", highlight=False, soft_wrap=True, markup=False)
    if stack.uses_demo:
        console.print(f"  adapters: {' '.join(demo.NAMES)}", highlight=False, soft_wrap=True)
    console.print(f"  lora-extproc list --stager {stack.nodes[0].stager}", highlight=False, soft_wrap=True)
    console.print("Ctrl-C stops everything.\n", highlight=False)


def request_line(record: dict[str, Any]) -> str:
    """One access log record in one line: model, node, hit or staged from where, wait, status."""
    status = str(record.get("status") or "-")
    outcome = record.get("outcome") or record.get("reason") or record.get("details") or "-"
    if outcome == "staged":
        outcome = f"staged from {record.get('origin')}"
    waited = record.get("waited_ms")
    parts = [
        f"{record.get('model') or record.get('path') or '-'}",
        f"{record.get('owner') or '-'}",
        f"{outcome}",
        "" if waited is None else f"waited {waited:.0f} ms",
        f"{status} in {record.get('duration_ms', 0)} ms",
    ]
    return "  ".join(part for part in parts if part)


def say_request(console: Console, record: dict[str, Any]) -> None:
    """`request_line`, coloured by status."""
    style = _STYLES.get(str(record.get("status", ""))[:1])
    console.print(request_line(record), style=style, highlight=False, soft_wrap=True, markup=False)
