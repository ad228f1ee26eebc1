"""Which files make an adapter, as engines name them, and what they may be packed in."""

from collections.abc import Iterable

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt")  # what vLLM reads where there are no safetensors
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")


def wanted(paths: Iterable[str]) -> list[str]:
    """Of all the files an origin lists, those an engine reads: the configuration and one file of weights, safetensors before pickle."""
    have = set(paths)
    weights = next((path for path in (WEIGHTS_FILE, *PICKLE_FILES) if path in have), WEIGHTS_FILE)
    return [path for path in (CONFIG_FILE, weights) if path in have]


def archive_suffix(path: str) -> str:
    """The suffix that makes `path` an archive; "" if it is none."""
    return max((suffix for suffix in ARCHIVE_SUFFIXES if path.endswith(suffix)), key=len, default="")
