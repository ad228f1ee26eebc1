"""`adapter_config.json`: who it is for, its ranks, and what the engine would refuse of it. Read before the weights are fetched.

Only the keys that somebody here reads are built as values; the rest is checked to be JSON and passed over, so that a megabyte of it costs a
millisecond. What the keys mean to an engine stands in core/features.py.
"""

import codecs
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import IO, Any

import msgspec

from ...core import features
from .files import CONFIG_FILE, foreign, refuse
from .rules import Rules

MAX_CONFIG_BYTES = 2**20  # real ones have some kilobytes; one that lists every expert's full name 0.8 MB
MAX_VALUE_BYTES = 2**16  # of one value that is read, other than the lists below
MAX_BASE_CHARACTERS = 4096  # a path

_BASE_KEY = "base_model_name_or_path"
_PATTERNS = ("rank_pattern", "alpha_pattern")
_NUMBERS = msgspec.json.Decoder(dict[str, int | float] | None)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A configuration that was checked."""

    base_model: str  # "" where it names none
    fields: features.Config  # what the table of features reads


def check_config(text: bytes, rules: Rules) -> AdapterConfig:
    """Read a PEFT LoRA configuration, and hold it to the rules. Raises InvalidAdapter."""
    raw = _members(text)
    fields = {key: _value(key, raw[key]) for key in features.KEYS & raw.keys()}
    if what := features.complaint(fields):
        refuse(CONFIG_FILE, what)
    for found in features.of_config(fields):
        if what := found.refusal(rules.engine, rules.version):
            refuse(CONFIG_FILE, what, "feature")
    base = _value(_BASE_KEY, raw[_BASE_KEY]) if _BASE_KEY in raw else None
    _check_base(base, rules)
    if rules.by_resolver and (fields.get("peft_type") != "LORA" or base is None):
        refuse(CONFIG_FILE, f"has no {_BASE_KEY}, or no peft_type LORA; vLLM's resolver needs both")
    rank = max(features.ranks(fields))
    if rules.max_rank and rank > rules.max_rank:
        refuse(CONFIG_FILE, f"has rank {rank}; this node's engine takes up to {rules.max_rank}", "rank")
    return AdapterConfig(base if isinstance(base, str) else "", fields)


def read_limited(file: IO[bytes]) -> bytes:
    """The text of a configuration, and no more than one may have: others may have put anything there. Raises InvalidAdapter, OSError."""
    text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        refuse(CONFIG_FILE, f"has over {MAX_CONFIG_BYTES} bytes")
    return text


def with_base(text: bytes, base_model: str) -> bytes:
    """A configuration that was checked, made to name `base_model`."""
    return msgspec.json.format(msgspec.json.encode({**_members(text), _BASE_KEY: base_model}), indent=2)


def _members(text: bytes) -> dict[str, msgspec.Raw]:
    if len(text) > MAX_CONFIG_BYTES:
        refuse(CONFIG_FILE, f"has {len(text)} bytes; the limit is {MAX_CONFIG_BYTES}")
    if what := foreign(text):
        refuse(CONFIG_FILE, what)
    try:
        text.decode()  # of what is passed over, msgspec does not look whether it is UTF-8; engines do
        return msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        if text.startswith(codecs.BOM_UTF8):
            refuse(CONFIG_FILE, "begins with a byte order mark, which engines do not read: save it as plain UTF-8")
        refuse(CONFIG_FILE, "is not a JSON object" if isinstance(error, msgspec.ValidationError) else "is not JSON in UTF-8, or too deeply nested")


def _value(key: str, raw: msgspec.Raw) -> Any:
    """What the key holds. Lists with a name for each module may be long; of the targets only their kind counts, since the tensors say what there is."""
    if key == "target_modules" and bytes(raw)[:1] == b"[":
        return ()
    if key in _PATTERNS:
        try:
            return _NUMBERS.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return "no object of numbers"  # which the table complains of
    if len(bytes(raw)) > MAX_VALUE_BYTES:
        refuse(CONFIG_FILE, f"has a {key} of {len(bytes(raw))} bytes; the limit is {MAX_VALUE_BYTES}")
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError):
        refuse(CONFIG_FILE, f"has a {key} that cannot be read")


def _check_base(base: object, rules: Rules) -> None:
    if not rules.base_model:
        return
    if not isinstance(base, str) or not base:
        refuse(CONFIG_FILE, f"has no {_BASE_KEY}; this node serves {rules.base_model!r}", "base_model")
    if len(base) > MAX_BASE_CHARACTERS:
        refuse(CONFIG_FILE, f"has a {_BASE_KEY} of {len(base)} characters; the limit is {MAX_BASE_CHARACTERS}", "base_model")
    if base != rules.base_model and not any(fnmatchcase(base, pattern) for pattern in rules.base_names):
        refuse(CONFIG_FILE, f"is for base model {base[:100]!r}; this node serves {rules.base_model!r}", "base_model")
