"""Where artifacts come from."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .values import Bytes, Group, Seconds


class OriginSettings(Group):
    """Where artifacts come from. `type` decides which of the others count."""

    type: Literal["file", "huggingface", "s3", "http"]
    """`file`, `huggingface`, `s3` or `http`. Origins are asked in the configured order, and the files of two are never mixed."""
    name: str = ""
    """What logs and metrics call it. Empty: its type. Needed where two origins have the same type."""
    path: str = ""
    """file: the directory that holds one directory per adapter."""
    in_place: bool = False
    """file: read where they are instead of copied: for a file system as fast as the node's own. They take nothing of `stager.max_bytes`."""
    url: str = ""
    """http: the base address, `URL/<adapter>/<file>`. huggingface: the hub's address; empty = `HF_ENDPOINT` or the public hub."""
    bucket: str = ""
    """s3: the bucket."""
    prefix: str = ""
    """s3: what stands before `<adapter>/<file>` in the keys."""
    endpoint: str = ""
    """s3: the server's address, for S3-compatible stores. Empty: AWS."""
    region: str = ""
    """s3: the region. Empty: from the environment."""
    addressing: Literal["auto", "path", "virtual"] = "auto"
    """s3: the bucket in the path or in the host name. `auto`: path with an `endpoint`, as AWS wants it without."""
    anonymous: bool = False
    """s3: send no credentials. Otherwise the usual chain of environment, files and instance role, refreshed before they end."""
    parallel: Annotated[int, Field(ge=1, le=64)] = 4
    """s3, http, huggingface: how many ranges of a large file are read at once."""
    parallel_above_bytes: Bytes = 256 * 2**20
    """Smaller files are read by one request."""
    token_env: str = ""
    """huggingface, http: the environment variable that holds the bearer token. Empty: `HF_TOKEN` for huggingface, none for http."""
    token_file: str = ""
    """huggingface, http: a file that holds the token; read anew for each adapter, so that it may be rotated."""
    adapter_token_env: dict[str, str] = {}
    """huggingface, http: shell pattern of adapter names -> the environment variable with the token for those. The first that matches wins."""
    username: str = ""
    """http: the user of basic authentication; its password is the token."""
    allow_private: bool = False
    """http: whether addresses that are private, loopback or link-local may be asked. Refused by default, redirects included."""
    archives: bool = True
    """Where there is no `<adapter>/` directory, look for `<adapter>.tar`, `.tar.gz`, `.tgz` and `.zip`, and unpack it."""
    listed: bool = True
    """file, s3: whether `GET /v1/models` may show what it has and no node has yet. Off where its names are not for every client; they are served all the
    same. A hub and a plain web server cannot be listed: of what they have, that list shows only what is staged."""
    max_fetches: Annotated[int, Field(ge=1)] = 8
    """How many files are fetched from it at once; requests go before refreshes, those before prefetches."""
    max_bytes_per_s: Annotated[int, Field(ge=0)] = 0
    """What may be fetched from it per second, in bytes; the hub's Xet transfers are not slowed. 0: no limit."""
    timeout_s: Seconds = 30.0
    """How long a connection, a silent transfer or a look into a directory is waited for."""
    min_bytes_per_s: Annotated[int, Field(ge=0)] = 8192
    """A transfer that brings less, measured over 30 s of waiting for it, is broken off, and given up after three attempts: it would hold one of
    `max_fetches` for as long as it trickles. At 8 KiB/s not even a small adapter of 16 MiB arrives within `fetch_timeout_s`. 0: however slow."""
    mirror_of: str = ""
    """The name of an earlier origin that has the same adapters under the same names: while that one fails or refuses, this one is asked in its place.
    Empty: none. A name belongs to the first origin that has it or, being down, could have it; what a later one has under that name is somebody else's."""
    missing_is_403: bool = False
    """http, s3: the store answers 403 for what it has not got, as S3 and CloudFront do where listing is not permitted. Then 403 for a name means that
    it is not there; wrong credentials look the same, which is why this is off by default."""
    links_outside: bool = False
    """file: whether links below `path` may lead out of it. Refused by default: who may write one adapter could have any file of this machine read."""

    @model_validator(mode="after")
    def _check_needed(self) -> "OriginSettings":
        needed = {"file": "path", "s3": "bucket", "http": "url"}.get(self.type)
        if needed and not getattr(self, needed):
            raise ValueError(f"an origin of type {self.type} needs {needed}")
        return self

    @property
    def label(self) -> str:
        return self.name or self.type
