"""The flags that charts pass to an Endpoint Picker, as settings: so that a chart made for the reference one can name our image.

Names, meanings and defaults are those of the reference picker (LWEPP of the Gateway API Inference Extension, v1.6) and of llm-d's. Where flags name a pool,
their defaults count as well: encrypted with a certificate made at start, and ports on every address. Flags of theirs that mean nothing here are refused
as unknown ones are: one that is passed over in silence would look as if it did something. `--conformance` alone is our own.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from .config.read import parse
from .config.settings import Settings
from .errors import StartError

POOL_GROUP = "inference.networking.k8s.io"
EVERY_ADDRESS = "0.0.0.0"  # noqa: S104  # as the reference picker listens: in a pod, which has a network of its own
PORTS = {"listen": 9002, "health_listen": 9003, "http_listen": 9090}
TRUE, FALSE = ("true", "1", "t"), ("false", "0", "f")  # as Go writes a boolean flag


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        known = ", ".join(action.option_strings[0] for action in self._actions)
        raise StartError(f"router: {message[:100]}" + (f"; flags that are known: {known}" if message.startswith("unrecognized") else ""))


def _parser() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pool-name", default="")
    parser.add_argument("--pool-namespace", default="")
    parser.add_argument("--pool-group", default=POOL_GROUP, choices=[POOL_GROUP])
    parser.add_argument("--endpoint-selector", default="")
    parser.add_argument("--kubeconfig", default="")
    parser.add_argument("--endpoint-target-ports", type=_ports, default=())
    parser.add_argument("--grpc-port", dest="listen", type=_port)
    parser.add_argument("--grpc-health-port", dest="health_listen", type=_port)
    parser.add_argument("--metrics-port", dest="http_listen", type=_port)
    parser.add_argument("--secure-serving", nargs="?", const=True, type=_boolean)
    parser.add_argument("--cert-path", default="")
    parser.add_argument("--zap-encoder", choices=["json", "console"])
    parser.add_argument("--conformance", action="store_true")  # `router.conformance`, since the suite's manifests have flags alone
    return parser


def with_flags(settings: Settings, arguments: Sequence[str]) -> Settings:
    """`settings` as the flags change them. Raises StartError for an unknown flag, and ConfigError for what does not go together."""
    if not arguments:
        return settings
    flags = _parser().parse_args(arguments)
    raw = settings.model_dump(mode="json")
    names_a_pool = bool(flags.pool_name or flags.endpoint_selector)
    for setting, default in PORTS.items():
        port = getattr(flags, setting)
        if port is not None or names_a_pool:
            raw["router"][setting] = f"{EVERY_ADDRESS}:{default if port is None else port}"
    if flags.secure_serving is not None or names_a_pool:
        raw["router"]["tls"] = _tls(flags.secure_serving is not False, flags.cert_path)
    if flags.zap_encoder is not None:
        raw["log"]["format"] = "json" if flags.zap_encoder == "json" else "text"
    raw["router"]["conformance"] |= flags.conformance
    if names_a_pool:
        _add_pool(raw, flags)
    return parse(raw, source="router")


def _add_pool(raw: dict[str, Any], flags: argparse.Namespace) -> None:
    """The source of endpoints that the flags name, for the pool of that name; the settings may have it already, with its base models."""
    has_stagers = not raw["router"]["conformance"]  # echo servers have none
    stager_port = int(raw["stager"]["listen"].rpartition(":")[2]) if has_stagers else 0
    source: dict[str, Any] = {"type": "kubernetes", "namespace": flags.pool_namespace, "kubeconfig": flags.kubeconfig, "stager_port": stager_port}
    if flags.pool_name:
        source["inference_pool"] = flags.pool_name
    else:
        source |= {"selector": flags.endpoint_selector, "ports": list(flags.endpoint_target_ports)}
    name = flags.pool_name or "endpoints"
    pool = next((pool for pool in raw["pools"] if pool["name"] == name), None)
    if pool is None:
        pool = {"name": name, "discovery": []}
        raw["pools"].append(pool)
    pool["discovery"].append(source)


def _tls(is_secure: bool, cert_path: str) -> dict[str, str]:
    """llm-d's `--cert-path` is a directory with the pair of a Kubernetes TLS secret."""
    if not is_secure:
        return {"mode": "off"}
    if cert_path:
        return {"mode": "files", "cert_file": f"{cert_path}/tls.crt", "key_file": f"{cert_path}/tls.key"}
    return {"mode": "self-signed"}


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port")
    return int(text)


def _ports(text: str) -> tuple[int, ...]:
    return tuple(_port(part.strip()) for part in text.split(","))


def _boolean(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in TRUE
