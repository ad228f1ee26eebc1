"""A local Hugging Face hub for tests: an aiohttp server that answers the model-repository HTTP API from in-memory commits."""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from http import HTTPStatus
from typing import Any, Literal, Self
from urllib.parse import quote, unquote

from aiohttp import web

Kind = Literal["status", "truncate", "stall", "wrong_length", "wrong_bytes", "change_mid_download", "drop"]

_BODY_KINDS = ("truncate", "stall", "wrong_bytes", "change_mid_download")
_CHUNK = 64 * 1024
_FLIP = bytes(255 - value for value in range(256))
_NAME = r"(?P<repo>[^/]+(?:/[^/]+)?)"
_CDN = re.compile(rf"/cdn/{_NAME}/(?P<rev>[0-9a-f]{{64}})/(?P<path>.+)")
_CACHE = re.compile(rf"/api/resolve-cache/models/{_NAME}/(?P<rev>[0-9a-f]{{40}})/(?P<path>.+)")
_TREE = re.compile(rf"/api/models/{_NAME}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?")
_INFO = re.compile(rf"/api/models/{_NAME}(?:/revision/(?P<rev>[^/]+))?")
_RESOLVE = re.compile(rf"/{_NAME}/resolve/(?P<rev>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True)
class Blob:
    """One file's content with the identifiers git, or git-lfs when sha256 is set, gives it."""

    data: bytes
    oid: str
    sha256: str | None = None
    pointer_size: int = 0

    @classmethod
    def of(cls, data: bytes, lfs: bool) -> Self:
        """Compute the identifiers of a content; an LFS file's git oid is that of its pointer."""
        if not lfs:
            return cls(data, _git_oid(data))
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
        return cls(data, _git_oid(pointer), sha256, len(pointer))


@dataclass(frozen=True)
class Commit:
    """A whole tree of files under one commit sha."""

    sha: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """A model repository: commits by sha, and the branches that point at them."""

    gated: bool = False
    private_token: str | None = None
    lfs: Sequence[str] = ()
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """A scripted misbehaviour; `times` counts down to 0 as matching requests use it up."""

    kind: Kind
    pattern: str
    times: int = 1
    method: str = ""  # "" is GET for the kinds that concern a body, any method for the others
    status: int = 503  # status: with retry_after as the Retry-After header
    retry_after: int | None = None
    at: int | None = None  # truncate, stall: how many bytes get through, None for half
    reset: bool = False  # truncate, drop: close by RST in place of FIN
    delta: int = 1  # wrong_length: added to the declared size, in an API listing to that of the files matching `file`
    file: str = "*"
    files: Mapping[str, bytes] | None = None  # change_mid_download: the new tree, None for the asked file with other bytes


class _Refusal(Exception):
    def __init__(self, status: int, code: str | None, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}


class Hub:
    """The server: add commits, script faults, read the counters.

    With `resolve_cache`, files outside LFS are answered by a 307 to a path pinned to the commit, as huggingface.co does today.
    """

    def __init__(self, *, resolve_cache: bool = False, page_size: int | None = None) -> None:
        self.resolve_cache, self.page_size = resolve_cache, page_size
        self.url = self.cdn_url = ""
        self.requests: list[tuple[str, str, int]] = []
        self.invalid_tokens: set[str] = set()  # refused everywhere, as expired ones are
        self.bytes_sent = 0
        self._bodies: list[str] = []
        self._repos: dict[str, Repo] = {}
        self._faults: list[Fault] = []
        self._closing = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen on two loopback ports, so that /cdn has an origin of its own and clients drop their token there."""
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._closing = asyncio.Event()
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.2)
        await self._runner.setup()
        for _ in range(2):
            await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url, self.cdn_url = (f"http://127.0.0.1:{address[1]}" for address in self._runner.addresses)

    def release(self) -> None:
        """Let stalled answers break off."""
        self._closing.set()

    async def stop(self) -> None:
        """Let go of stalled answers and close both ports."""
        self.release()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        revision: str = "main",
        gated: bool = False,
        private_token: str | None = None,
        lfs: Sequence[str] = ("*.safetensors", "*.bin"),
    ) -> str:
        """Commit `files` as the whole tree, move the branch and return the sha.

        `private_token` alone hides the repository from all others; with `gated` it is the one token on the access list.
        """
        repo = self._repos.setdefault(repo_id, Repo())
        repo.gated, repo.private_token, repo.lfs = gated, private_token, tuple(lfs)
        return self._commit(repo_id, files, revision)

    def fault(self, kind: Kind, path_pattern: str, times: int = 1, **args: Any) -> Fault:
        """Misbehave on the next `times` requests whose decoded path matches the glob; `args` are the fields of Fault."""
        self._faults.append(Fault(kind, path_pattern, times, **args))
        return self._faults[-1]

    def gets(self, pattern: str = "*") -> int:
        """Count the GETs answered with a file's body, on paths matching the glob."""
        return sum(fnmatchcase(path, pattern) for path in self._bodies)

    def _commit(self, repo_id: str, files: Mapping[str, bytes], revision: str) -> str:
        repo = self._repos[repo_id]
        blobs = {path: Blob.of(data, any(fnmatchcase(path, glob) for glob in repo.lfs)) for path, data in sorted(files.items())}
        lines = [repo_id, repo.branches.get(revision, ""), *(f"{blob.oid} {path}" for path, blob in blobs.items())]
        sha = hashlib.sha1("\n".join(lines).encode()).hexdigest()
        date = datetime.fromtimestamp(1_700_000_000 + len(repo.commits), UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        repo.commits[sha] = Commit(sha, date, blobs)
        repo.branches[revision] = sha
        return sha

    def _take(self, kind: Kind, request: web.Request) -> Fault | None:
        path = unquote(request.rel_url.raw_path)
        for fault in self._faults:
            verb = fault.method or ("GET" if kind in _BODY_KINDS else "*")
            if fault.kind == kind and fault.times > 0 and verb in ("*", request.method) and fnmatchcase(path, fault.pattern):
                fault.times -= 1
                return fault
        return None

    def _note(self, request: web.Request, status: int) -> None:
        self.requests.append((request.method, unquote(request.rel_url.raw_path), status))

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if fault := self._take("drop", request):
            self._note(request, 0)
            _sever(request, fault.reset)
            return web.Response()
        try:
            if fault := self._take("status", request):
                after = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                raise _Refusal(fault.status, None, HTTPStatus(fault.status).phrase, after)
            response: web.StreamResponse = await self._answer(request)
        except _Refusal as refusal:
            response = web.json_response({"error": str(refusal)}, status=refusal.status, headers=refusal.headers)
        if not response.prepared:
            self._note(request, response.status)
        return response

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        raw = request.rel_url.raw_path
        listing = raw.startswith("/api/models/")
        if (listing or request.method == "HEAD") and self._take("stall", request):
            self._note(request, 0)
            await self._closing.wait()
        if request.method not in ("GET", "HEAD"):
            raise _Refusal(405, None, "Method Not Allowed")
        if match := _CDN.fullmatch(raw) or _CACHE.fullmatch(raw) or (None if listing else _RESOLVE.fullmatch(raw)):
            return await self._file(request, match)
        if match := _TREE.fullmatch(raw):
            return self._tree(request, match)
        if match := _INFO.fullmatch(raw):
            return self._info(request, match)
        raise _Refusal(404, None, "Not Found")

    def _find(self, request: web.Request, match: re.Match[str], *, content: bool = False) -> tuple[str, Repo, Commit]:
        name, rev = unquote(match["repo"]), unquote(match["rev"] or "main")
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in self.invalid_tokens:
            raise _Refusal(401, None, "Invalid credentials in Authorization header")
        repo = self._repos.get(name)
        if repo is None or (repo.private_token is not None and not repo.gated and token != repo.private_token):
            status, message = (404, "Repository not found") if token else (401, "Invalid username or password.")
            raise _Refusal(status, "RepoNotFound", message)
        if content and repo.gated and (not token or token != repo.private_token):
            stranger = f" and you are not in the authorized list. Visit {self.url}/{name} to ask for access."
            anonymous = ". You must have access to it and be authenticated to access it. Please log in."
            status, message = (403, stranger) if token else (401, anonymous)
            raise _Refusal(status, "GatedRepo", f"Access to model {name} is restricted{message}")
        commit = repo.commits.get(repo.branches.get(rev, rev))
        if commit is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return name, repo, commit

    def _change(self, request: web.Request, match: re.Match[str]) -> None:
        name, asked, path = (unquote(match[group]) for group in ("repo", "rev", "path"))
        repo = self._repos.get(name)
        if repo is not None and request.method == "GET" and (fault := self._take("change_mid_download", request)):
            branch = asked if asked in repo.branches else next(iter(repo.branches))
            files = {old: blob.data for old, blob in repo.commits[repo.branches[branch]].files.items()}
            self._commit(name, fault.files or {**files, path: files.get(path, b"").translate(_FLIP)}, branch)

    async def _file(self, request: web.Request, match: re.Match[str]) -> web.StreamResponse:
        self._change(request, match)
        path = unquote(match["path"])
        if match.re is _CDN:
            commits = self._repos.get(unquote(match["repo"]), Repo()).commits.values()
            stored = next((blob for commit in commits if (blob := commit.files.get(path)) and blob.sha256 == match["rev"]), None)
            if stored is None or "Authorization" in request.headers:
                raise _Refusal(400 if stored else 403, None, "Only one auth mechanism allowed" if stored else "Access Denied")
            return await self._send(request, stored, {})
        name, _, commit = self._find(request, match, content=True)
        pinned, blob = {"X-Repo-Commit": commit.sha}, commit.files.get(path)
        if blob is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found", pinned)
        if blob.sha256 is None and (match.re is _CACHE or not self.resolve_cache):
            return await self._send(request, blob, pinned)
        if blob.sha256 is None:
            status, location = 307, f"/api/resolve-cache/models/{name}/{commit.sha}/{quote(path)}?etag=%22{blob.oid}%22"
        else:
            signature = f"Expires=4102444800&Signature={commit.sha[:16]}"
            status, location = 302, f"{self.cdn_url}/cdn/{name}/{blob.sha256}/{quote(path)}?{signature}"
        wrong = self._take("wrong_length", request) if blob.sha256 and request.method == "HEAD" else None
        size = _sizes(path, blob, wrong, "")["size"]
        linked = {"X-Linked-Etag": f'"{blob.sha256 or blob.oid}"', "X-Linked-Size": str(size), "Accept-Ranges": "bytes"}
        text = f"{HTTPStatus(status).phrase}. Redirecting to {location}"
        return web.Response(status=status, text=text, headers={**pinned, **linked, "Location": location, "Vary": "Origin, Accept"})

    async def _send(self, request: web.Request, blob: Blob, headers: Mapping[str, str]) -> web.StreamResponse:
        head, size = request.method == "HEAD", len(blob.data)
        start, stop, facts = 0, size, {**headers, "ETag": f'"{blob.sha256 or blob.oid}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if not head and wanted and any(wanted.groups()):
            first, last = wanted.groups()
            start = int(first) if first else max(0, size - int(last))
            stop = min(size, int(last) + 1) if first and last else size
            if start >= stop:
                raise _Refusal(416, None, "Range Not Satisfiable", {"Content-Range": f"bytes */{size}"})
            facts["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        response = web.StreamResponse(status=206 if "Content-Range" in facts else 200, headers=facts)
        response.content_type = "text/plain" if blob.sha256 is None else "application/octet-stream"
        wrong = self._take("wrong_length", request) if head else None
        response.content_length = max(0, stop - start + (wrong.delta if wrong else 0))
        self._note(request, response.status)
        self._bodies += [] if head else [unquote(request.rel_url.raw_path)]
        await response.prepare(request)
        if head:
            return response
        body = memoryview(blob.data.translate(_FLIP) if self._take("wrong_bytes", request) else blob.data)[start:stop]
        cut = self._take("truncate", request) or self._take("stall", request)
        limit = len(body) if cut is None else min(len(body), len(body) // 2 if cut.at is None else cut.at)
        for at in range(0, limit, _CHUNK):
            piece = body[at : min(at + _CHUNK, limit)]
            self.bytes_sent += len(piece)
            await response.write(piece)
        if cut is not None and cut.kind == "stall":
            await self._closing.wait()
        if cut is not None:
            await asyncio.sleep(0.05 if cut.reset else 0)
            _sever(request, cut.reset)
        return response

    def _info(self, request: web.Request, match: re.Match[str]) -> web.Response:
        name, repo, commit = self._find(request, match)
        wrong = self._take("wrong_length", request) if "blobs" in _flags(request) else None
        siblings = [{"rfilename": path, "blobId": blob.oid, **_sizes(path, blob, wrong, "sha256")} for path, blob in commit.files.items()]
        if "blobs" not in _flags(request):
            siblings = [{"rfilename": path} for path in commit.files]
        born = next(iter(repo.commits.values())).date
        about: dict[str, Any] = {"_id": hashlib.sha1(name.encode()).hexdigest()[:24], "id": name, "modelId": name, "sha": commit.sha}
        about |= {"author": name.partition("/")[0], "lastModified": commit.date, "createdAt": born, "disabled": False, "tags": []}
        about |= {"private": repo.private_token is not None and not repo.gated, "gated": "manual" if repo.gated else False}
        return web.json_response({**about, "downloads": 0, "likes": 0, "siblings": siblings})

    def _tree(self, request: web.Request, match: re.Match[str]) -> web.Response:
        _, _, commit = self._find(request, match)
        recursive, expand = (flag in _flags(request) for flag in ("recursive", "expand"))
        base = f"{unquote(match['path'])}/" if match["path"] else ""
        inside = {path: blob for path, blob in commit.files.items() if path.startswith(base)}
        if base and not inside:
            raise _Refusal(404, "EntryNotFound", f"{base[:-1]} does not exist on {unquote(match['rev'])}", {"X-Repo-Commit": commit.sha})
        wrong = self._take("wrong_length", request)
        scan = {"securityFileStatus": {"status": "safe", "avScan": None, "pickleImportScan": None}} if expand else {}
        last = {"lastCommit": {"id": commit.sha, "title": "Update", "date": commit.date}} if expand else {}
        folders: dict[str, dict[str, Any]] = {}
        plain: list[dict[str, Any]] = []
        for path, blob in inside.items():
            steps = path[len(base) :].split("/")[:-1]
            for folder in (base + "/".join(steps[: depth + 1]) for depth in range(len(steps)) if recursive or not depth):
                oid = _git_oid(f"{commit.sha} {folder}".encode())
                folders[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder, **last}
            if recursive or not steps:
                plain.append({"type": "file", "oid": blob.oid, "path": path, **_sizes(path, blob, wrong, "oid"), **last, **scan})
        entries = [folders[folder] for folder in sorted(folders)] + plain
        most = min(self.page_size or (50 if expand else 1000), int(request.query.get("limit", 1000)))
        begin = int(request.query.get("cursor", 0))
        more = {"Link": f'<{request.url.update_query(cursor=begin + most)}>; rel="next"'} if begin + most < len(entries) else {}
        return web.json_response(entries[begin : begin + most], headers=more)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _flags(request: web.Request) -> set[str]:
    return {name for name, value in request.query.items() if value.lower() in ("true", "1")}


def _sizes(path: str, blob: Blob, wrong: Fault | None, digest: str) -> dict[str, Any]:
    size = len(blob.data) + (wrong.delta if wrong and fnmatchcase(path, wrong.file) else 0)
    lfs = {"lfs": {digest: blob.sha256, "size": size, "pointerSize": blob.pointer_size}}
    return {"size": size, **(lfs if blob.sha256 else {})}


def _sever(request: web.Request, reset: bool) -> None:
    if (transport := request.transport) is None:
        return
    if reset:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.close()
