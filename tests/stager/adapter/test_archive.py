"""Archives: what is in a good one is served, and nothing of a bad one is ever to be seen, inside the node's directory or outside."""

import contextlib
import gzip
import io
import lzma
import os
import random
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.config.origins import OriginSettings
from extproc.core.blocks import on_disk
from extproc.errors import AdapterTooLarge, InvalidAdapter, ModelNotFound, NoSpace
from extproc.stager.adapter import archive
from extproc.stager.adapter.files import ARCHIVE_SUFFIXES
from extproc.up.demo import write_adapter
from tests.fakes.adapters import CONFIG, PICKLE, WEIGHTS, Files, read_files, safetensors, sha256, size_of, small_files, split, write_small
from tests.fakes.archives import packed, special, tar_of, zip_of
from tests.fakes.faulty import FaultyS3, FaultyServer, running
from tests.fakes.hub import Hub
from tests.fakes.nodes import hub_origin, node, nothing_half_done, nothing_there, s3_origin, stored, visible, web_origin
from tests.fakes.wait import Clock

NAME = "acme/sql"
FILES = small_files()
INFO = tarfile.TarInfo


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The directory of a file origin."""
    (tmp_path / "origin" / "acme").mkdir(parents=True)
    return tmp_path / "origin"


@pytest.fixture
def file_origin(root: Path) -> OriginSettings:
    return OriginSettings(type="file", path=str(root))


# -- every kind, from everywhere


@contextlib.asynccontextmanager
async def serving(kind: str, root: Path, path: str, data: bytes) -> AsyncIterator[OriginSettings]:
    """An origin of that type which has `data` at `path`, as its own layout puts it."""
    match kind:
        case "file":
            (root / path).write_bytes(data)
            yield OriginSettings(type="file", path=str(root))
        case "http":
            async with running(FaultyServer()) as server:
                server.files[f"/{path}"] = data
                yield web_origin(server.url)
        case "s3":
            async with running(FaultyS3()) as s3:
                s3.files[f"/models/{path}"] = data
                yield s3_origin(s3.url)
        case "huggingface":
            async with Hub() as hub:
                hub.add(NAME, {path.rpartition("/")[2]: data, "README.md": b"x"}, lfs=("*.tar", "*.zip"))
                yield hub_origin(hub.url)
                close_session()


@pytest.mark.parametrize("kind", ["file", "http", "s3", "huggingface"])
@pytest.mark.parametrize("suffix", ARCHIVE_SUFFIXES)
async def test_an_archive_is_unpacked(tmp_path: Path, root: Path, kind: str, suffix: str) -> None:
    """What an engine sees is what it would see of the files themselves; the archive is not kept, and takes no room."""
    async with serving(kind, root, NAME + suffix, packed(suffix, FILES)) as origin, node(tmp_path / "node", origin) as stager:
        held = await stager.ensure(NAME)
        assert visible(tmp_path / "node") == {NAME: FILES}
        assert held.origin == kind
        assert held.size == stager.node.holdings.index.used_bytes == size_of(FILES)
        assert nothing_half_done(stager)


@pytest.mark.parametrize("kind", ["file", "http", "s3", "huggingface"])
async def test_archives_may_be_switched_off(tmp_path: Path, root: Path, kind: str) -> None:
    """Then there is nothing under that name."""
    async with serving(kind, root, NAME + ".tar", packed(".tar", FILES)) as origin:
        switched_off = origin.model_copy(update={"archives": False})
        async with node(tmp_path / "node", switched_off) as stager:
            with pytest.raises(ModelNotFound):
                await stager.ensure(NAME)


async def test_a_directory_goes_before_an_archive(tmp_path: Path, root: Path, file_origin: OriginSettings) -> None:
    """Of the same name: it was unpacked already."""
    (root / f"{NAME}.tar").write_bytes(packed(".tar", small_files(seed=1)))
    (root / NAME).mkdir()
    for path, data in FILES.items():
        (root / NAME / path).write_bytes(data)
    async with node(tmp_path / "node", file_origin) as stager:
        await stager.ensure(NAME)
        assert visible(tmp_path / "node") == {NAME: FILES}


async def test_a_new_archive_is_a_new_version(tmp_path: Path, root: Path, file_origin: OriginSettings) -> None:
    """A comparison with the origin finds it; the same archive again is the same."""
    (root / f"{NAME}.zip").write_bytes(packed(".zip", FILES))
    async with node(tmp_path / "node", file_origin) as stager:
        await stager.ensure(NAME)
        assert not await stager.refresh(NAME)
        (root / f"{NAME}.zip").write_bytes(packed(".zip", small_files(seed=1)))
        os.utime(root / f"{NAME}.zip", (1, 1))
        assert await stager.refresh(NAME)
        assert visible(tmp_path / "node") == {NAME: small_files(seed=1)}
        assert len(stored(tmp_path / "node")) == 1
        assert nothing_half_done(stager)


# -- where in it the adapter is


def placed(folder: str, suffix: str, **others: bytes) -> bytes:
    return packed(suffix, {**{f"{folder}{path}": data for path, data in FILES.items()}, **others})


GOOD: dict[str, Callable[[], tuple[str, bytes]]] = {
    "in a folder": lambda: (".tar.gz", placed("sql-v1/", ".tar.gz")),
    "in a deep folder": lambda: (".zip", placed("a/b/c/", ".zip")),
    "behind ./": lambda: (".tar", placed("./", ".tar")),
    "with other files": lambda: (".zip", placed("", ".zip", **{"README.md": b"x", "checkpoint-1/optimizer.pt": b"x" * 9999})),
    "with weights elsewhere too": lambda: (".tar", placed("", ".tar", **{f"old/{WEIGHTS}": b"x"})),
    "with folders of their own": lambda: (
        ".tar.gz",
        tar_of([(special("sql", tarfile.DIRTYPE), b""), *((INFO(f"sql/{path}"), data) for path, data in FILES.items())], ".tar.gz"),
    ),
    "of a Mac": lambda: (".zip", placed("", ".zip", **{f"__MACOSX/._{CONFIG}": b"\0\5\x16\7", f"__MACOSX/._{WEIGHTS}": b"\0\5\x16\7"})),
    "of git archive": lambda: (".tar", git_archive()),
    "in the GNU form": lambda: (".tar", tar_of([(INFO("d" * 150 + "/" + path), data) for path, data in FILES.items()], format_=tarfile.GNU_FORMAT)),
    "in the pax form": lambda: (".tar", tar_of([(INFO("ü" * 150 + "/" + path), data) for path, data in FILES.items()])),
    "not compressed": lambda: (".zip", zip_of(list(FILES.items()), zipfile.ZIP_STORED)),
    "with a path that comes back": lambda: (".tar", placed("a/../sql/", ".tar")),
    "gzipped under the name of a tar": lambda: (".tar", packed(".tar.gz", FILES)),
    "not gzipped under the name of one": lambda: (".tar.gz", packed(".tar", FILES)),
    "with zeros behind its end": lambda: (".tar.gz", gzip.compress(packed(".tar", FILES) + bytes(2**23), 1)),
    "with checkpoints below it": lambda: (
        ".tar",
        placed("sql/", ".tar", **{f"sql/checkpoint-{step}/{path}": data for step in (1, 2) for path, data in small_files(seed=step).items()}),
    ),
    "with pickle beside": lambda: (".tar", placed("", ".tar", **{PICKLE: b"x"})),
}


def git_archive() -> bytes:
    """With a global header that holds the commit."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "f" * 40}) as tar:
        for path, data in FILES.items():
            info = INFO(f"sql/{path}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("how", GOOD)
async def test_the_adapter_may_be_anywhere_in_it(tmp_path: Path, root: Path, file_origin: OriginSettings, how: str) -> None:
    """As tools pack it. Only the configuration and the weights beside it are taken."""
    suffix, data = GOOD[how]()
    (root / (NAME + suffix)).write_bytes(data)
    async with node(tmp_path / "node", file_origin) as stager:
        await stager.ensure(NAME)
        assert visible(tmp_path / "node") == {NAME: FILES}
        assert nothing_half_done(stager)


# -- what refuses the whole


def tarred(*hostile: tuple[tarfile.TarInfo, bytes], suffix: str = ".tar", format_: int = tarfile.PAX_FORMAT) -> Callable[[], tuple[str, bytes]]:
    """A good adapter, and with it this."""
    return lambda: (suffix, tar_of([*((INFO(path), data) for path, data in FILES.items()), *hostile], suffix, format_))


def zipped(*hostile: tuple[str | zipfile.ZipInfo, bytes]) -> Callable[[], tuple[str, bytes]]:
    def make() -> tuple[str, bytes]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a name that comes twice
            return ".zip", zip_of([*FILES.items(), *hostile])

    return make


def moded(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


def raw_header(data: bytes, *, field: int, value: bytes) -> bytes:
    """The first tar header with other bytes at `field`, and a checksum that is right."""
    header = bytearray(data[:512])
    header[field : field + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


def huge_description(kind: bytes) -> bytes:
    """A header that describes the next member in eight gigabytes, which are not there."""
    return raw_header(tar_of([(special("x", kind), b"")]), field=124, value=b"77777777777\0")


def with_eocd(data: bytes, offset: int, value: bytes) -> bytes:
    """A zip with other bytes in the record at its end."""
    at = data.rindex(b"PK\5\6") + offset
    return data[:at] + value + data[at + len(value) :]


def with_central(data: bytes, number: int, offset: int, value: bytes) -> bytes:
    """A zip with other bytes in the entry of its directory with that number."""
    at = -1
    for _ in range(number + 1):
        at = data.index(b"PK\1\2", at + 1)
    return data[: at + offset] + value + data[at + offset + len(value) :]


def sized(size: int) -> bytes:
    return struct.pack("<I", size)


WEIGHTS_NUMBER = list(FILES).index(WEIGHTS)
GOOD_ZIP = packed(".zip", FILES)
HOSTILE: dict[str, Callable[[], tuple[str, bytes]]] = {
    **{
        f"{name!r} in a {kind}": make
        for name in ("../evil", "a/../../evil", "/etc/evil", "//evil", "..", "a\\..\\..\\evil")
        for kind, make in (("tar", tarred((INFO(name), b"evil"))), ("zip", zipped((name, b"evil"))))
    },
    "a symbolic link out": tarred((special(CONFIG + "x", tarfile.SYMTYPE, "/etc/passwd"), b"")),
    "a symbolic link within": tarred((special("link", tarfile.SYMTYPE, WEIGHTS), b"")),
    "a hard link": tarred((special("link", tarfile.LNKTYPE, WEIGHTS), b"")),
    "a character device": tarred((special("null", tarfile.CHRTYPE, devmajor=1, devminor=3), b"")),
    "a block device": tarred((special("sda", tarfile.BLKTYPE, devmajor=8), b"")),
    "a pipe": tarred((special("fifo", tarfile.FIFOTYPE), b"")),
    "a kind nobody knows": tarred((special("odd", b"Q"), b"")),
    "a sparse file": tarred((special("sparse", tarfile.GNUTYPE_SPARSE), b""), format_=tarfile.GNU_FORMAT),
    "a sparse file of the pax form": tarred((special("s", tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "999"}), b"x")),
    "a sparse file of the later pax form": tarred(
        (
            special("s", tarfile.REGTYPE, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}),
            b"1\n0\n1\n".ljust(513, b"\0"),
        )
    ),
    "a sparse map that does not end": tarred(
        (special("s", tarfile.REGTYPE, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}), b"99999999\n" + b"1\n" * 2**20)
    ),
    "a symbolic link in a zip": zipped((moded("link", 0o120777), b"/etc/passwd")),
    "a device in a zip": zipped((moded("null", 0o020666), b"")),
    "a name twice in a tar": tarred((INFO(CONFIG), FILES[CONFIG])),
    "a name twice in a zip": zipped((CONFIG, FILES[CONFIG])),
    "a name twice in two spellings": tarred((INFO(f"./x/../{WEIGHTS}"), b"x")),
    "too many members": tarred(*((INFO(f"{n}"), b"") for n in range(archive.MAX_MEMBERS)), suffix=".tar.gz"),
    "too many members in a zip": zipped(*((f"{n}", b"") for n in range(archive.MAX_MEMBERS))),
    "a directory of a zip that does not end": lambda: (".zip", zip_of([*FILES.items(), *((f"{n:0400}", b"") for n in range(9_990))])),
    "two configurations": lambda: (".tar", placed("first/", ".tar", **{f"second/{CONFIG}": FILES[CONFIG]})),
    "no configuration": lambda: (".zip", packed(".zip", {WEIGHTS: FILES[WEIGHTS]})),
    "no weights": lambda: (".tar", packed(".tar", {CONFIG: FILES[CONFIG]})),
    "weights in another folder": lambda: (".tar", packed(".tar", {CONFIG: FILES[CONFIG], f"x/{WEIGHTS}": FILES[WEIGHTS]})),
    "pickle alone": lambda: (".tar", packed(".tar", {CONFIG: FILES[CONFIG], PICKLE: b"x"})),
    "nothing": lambda: (".tar", tar_of([])),
    "nothing in a zip": lambda: (".zip", zip_of([])),
    "no byte": lambda: (".tar.gz", b""),
    "garbage in a tar": lambda: (".tar", b"garbage" * 1000),
    "garbage in a gzipped tar": lambda: (".tar.gz", b"\x1f\x8b\x08\0" + b"garbage" * 1000),
    "garbage in a zip": lambda: (".zip", b"PK\3\4" + b"garbage" * 1000),
    "gzip in gzip": lambda: (".tar.gz", gzip.compress(packed(".tar.gz", FILES))),
    "gzip with another checksum": lambda: (".tar.gz", packed(".tar.gz", FILES)[:-8] + bytes(8)),
    "gzip with a byte changed in the weights": lambda: (".tar.gz", gzip.compress(packed(".tar", FILES), 0).replace(FILES[WEIGHTS][-9:], bytes(9))),
    "zeros that do not end": lambda: (".tar.gz", gzip.compress(packed(".tar", FILES) + bytes(archive.MAX_TAIL_BYTES + 2 * archive.COPY_BYTES), 1)),
    "a tar under the name of a zip": lambda: (".zip", packed(".tar", FILES)),
    "an archive compressed in another way": lambda: (".tar.gz", compressed_otherwise(FILES)),
    "a zip compressed in another way": lambda: (".zip", zip_of(list(FILES.items()), zipfile.ZIP_LZMA)),
    "a zip compressed in a third way": lambda: (".zip", zip_of(list(FILES.items()), zipfile.ZIP_BZIP2)),
    "an encrypted zip": lambda: (".zip", with_central(GOOD_ZIP, WEIGHTS_NUMBER, 8, b"\1\0")),
    "a long name of gigabytes": lambda: (".tar", huge_description(tarfile.GNUTYPE_LONGNAME)),
    "a long link of gigabytes": lambda: (".tar", huge_description(tarfile.GNUTYPE_LONGLINK)),
    "a pax header of gigabytes": lambda: (".tar", huge_description(tarfile.XHDTYPE)),
    "a global pax header of gigabytes": lambda: (".tar.gz", gzip.compress(huge_description(tarfile.XGLTYPE))),
    "a member of a negative size": lambda: (".tar", raw_header(packed(".tar", FILES), field=124, value=b"\xff" * 12)),
    "a pax record of a negative size": tarred((special("x", tarfile.REGTYPE, pax_headers={"size": "-1"}), b"x")),
    "a zip that lies of its length, short": lambda: (".zip", with_central(GOOD_ZIP, WEIGHTS_NUMBER, 24, sized(len(FILES[WEIGHTS]) - 1))),
    "a zip that lies of its length, long": lambda: (".zip", with_central(GOOD_ZIP, WEIGHTS_NUMBER, 24, sized(len(FILES[WEIGHTS]) + 1))),
    "a zip that lies of its packed length, short": lambda: (".zip", with_central(GOOD_ZIP, WEIGHTS_NUMBER, 20, sized(10))),
    "a zip with another checksum": lambda: (".zip", with_central(GOOD_ZIP, WEIGHTS_NUMBER, 16, b"\0\0\0\0")),
    "a zip that points nowhere": lambda: (".zip", with_central(GOOD_ZIP, WEIGHTS_NUMBER, 42, sized(2**32 - 2))),
    "a zip without a directory": lambda: (".zip", with_eocd(GOOD_ZIP, 12, sized(2**31))),
    "a zip whose member has no name": lambda: (".zip", zip_of([*FILES.items(), (zipfile.ZipInfo(""), b"")])),
}


def compressed_otherwise(files: Files) -> bytes:
    """xz: its reader would take whatever memory the file says it needs."""
    return lzma.compress(packed(".tar", files))


@pytest.mark.parametrize("how", HOSTILE)
async def test_a_hostile_archive_leaves_nothing(tmp_path: Path, root: Path, file_origin: OriginSettings, how: str) -> None:
    """Neither inside the node's directory nor outside; and no other error than that the adapter is invalid."""
    suffix, data = HOSTILE[how]()
    (root / (NAME + suffix)).write_bytes(data)
    before = everything(tmp_path)
    async with node(tmp_path / "node", file_origin) as stager:
        with pytest.raises(InvalidAdapter) as raised:
            await stager.ensure(NAME)
        assert type(raised.value) is InvalidAdapter
        assert nothing_there(stager)
        assert everything(tmp_path, but="node") == before


def everything(directory: Path, but: str = "") -> dict[str, str]:
    """What is below it, by content."""
    there = (path for path in directory.rglob("*") if but not in path.relative_to(directory).parts)
    return {str(path): sha256(path.read_bytes()) if path.is_file() else "" for path in there}


@pytest.mark.parametrize("suffix", ARCHIVE_SUFFIXES)
async def test_an_archive_cut_short_is_invalid(tmp_path: Path, root: Path, file_origin: OriginSettings, suffix: str) -> None:
    """Wherever it ends, unless only the padding is missing."""
    data = packed(suffix, {path: FILES[path] for path in (CONFIG, WEIGHTS)})
    ends = (1536, 1535 + len(FILES[WEIGHTS])) if suffix == ".tar" else (len(data) - 22, len(data) - 8, len(data) - 1)
    async with node(tmp_path / "node", file_origin) as stager:
        for length in (0, 1, 2, 100, 512, 600, 1024, 2000, *ends):
            (root / (NAME + suffix)).write_bytes(data[:length])
            with pytest.raises(InvalidAdapter):
                await stager.ensure(NAME)
            assert nothing_there(stager)


# -- bombs


ZEROS = 2**26


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".zip"])
async def test_a_bomb_is_too_large_before_it_is_unpacked(tmp_path: Path, root: Path, file_origin: OriginSettings, suffix: str) -> None:
    """Sixty-four megabytes in some hundred kilobytes; also where they are in a file that nobody wants."""
    for path in (WEIGHTS, "other"):
        (root / (NAME + suffix)).write_bytes(packed(suffix, {**FILES, path: bytes(ZEROS)}))
        async with node(tmp_path / f"node-{path}", file_origin, max_adapter_bytes=2**20) as stager:
            with pytest.raises(AdapterTooLarge):
                await stager.ensure(NAME)
            assert nothing_there(stager)


async def test_many_small_members_are_a_bomb_together(tmp_path: Path, root: Path, file_origin: OriginSettings) -> None:
    """None of them is over a limit; the sum is."""
    (root / f"{NAME}.tar.gz").write_bytes(packed(".tar.gz", {**{f"{n}": bytes(2**17) for n in range(9)}, **FILES}))
    async with node(tmp_path / "node", file_origin, max_adapter_bytes=2**20) as stager:
        with pytest.raises(AdapterTooLarge, match="unpacks to over"):
            await stager.ensure(NAME)
        assert nothing_there(stager)


@pytest.mark.parametrize("size", ["8589934592", str(2**62)])
async def test_a_pax_header_that_claims_gigabytes_is_believed_to_be_too_large(tmp_path: Path, root: Path, file_origin: OriginSettings, size: str) -> None:
    """What it says counts for what it is: no such file is ever read."""
    (root / f"{NAME}.tar").write_bytes(tar_of([(special(WEIGHTS, tarfile.REGTYPE, pax_headers={"size": size}), b"x"), (INFO(CONFIG), FILES[CONFIG])]))
    async with node(tmp_path / "node", file_origin) as stager:
        with pytest.raises(InvalidAdapter):
            await stager.ensure(NAME)
        assert nothing_there(stager)


async def test_a_zip_that_says_less_than_it_holds_unpacks_to_what_it_says(tmp_path: Path, root: Path, file_origin: OriginSettings) -> None:
    """Sixty-four megabytes behind a header of a kilobyte: a kilobyte is written, then the checksum tells."""
    data = zip_of([(CONFIG, FILES[CONFIG]), (WEIGHTS, bytes(ZEROS))])
    (root / f"{NAME}.zip").write_bytes(with_central(data, 1, 24, sized(1000)))
    async with node(tmp_path / "node", file_origin, max_adapter_bytes=2**20) as stager:
        with pytest.raises(InvalidAdapter, match="cannot be unpacked"):
            await stager.ensure(NAME)
        assert nothing_there(stager)


@pytest.mark.parametrize("kind", [tarfile.XGLTYPE, tarfile.XHDTYPE])
def test_descriptions_are_limited_together(tmp_path: Path, kind: bytes) -> None:
    """Each is below the limit of one; the library would keep them all."""

    def described() -> Iterator[bytes]:
        for number in range(100):
            name = f"u{number}"
            record = b" %s=%s\n" % (name.encode(), b"x" * 900_000)
            record = str(len(record) + 6).encode() + record
            info = special("pax", kind, size=len(record))
            yield info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(-(-len(record) // 512) * 512, b"\0")
            yield INFO(name).tobuf()

    path = tmp_path / "archive.tar"
    path.write_bytes(b"".join(described()) + packed(".tar", FILES))
    with pytest.raises(InvalidAdapter):
        archive.members(path, max_bytes=2**30)


# -- what a bad one costs


def with_wrong_rank() -> Files:
    """The configuration comes first, as where names are sorted; the header of the weights contradicts it."""
    header, data = split(FILES[WEIGHTS])
    name = next(name for name in header if "lora_A" in name)
    header[name] = {**header[name], "shape": [2, 128]}
    return {CONFIG: FILES[CONFIG], WEIGHTS: safetensors(header, data)}


BAD = with_wrong_rank()
LISTED = {CONFIG: FILES[CONFIG], WEIGHTS: FILES[WEIGHTS]}  # in that order


@pytest.mark.parametrize("kind", ["file", "http", "s3", "huggingface"])
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("bad", [BAD, {**LISTED, CONFIG: b"[]"}], ids=["weights", "configuration"])
async def test_nothing_good_is_evicted_for_what_a_bad_archive_begins_with(tmp_path: Path, root: Path, kind: str, suffix: str, bad: Files) -> None:
    """The configuration and the header of the weights are judged as they arrive, before there is room for the rest."""
    write_small(root / "good/one", seed=1)
    clock = Clock()
    async with (
        serving(kind, root, NAME + suffix, packed(suffix, bad)) as origin,
        node(tmp_path / "node", origin, OriginSettings(type="file", name="good", path=str(root)), clock=clock, max_bytes=size_of(FILES), lease_s=1) as stager,
    ):
        await stager.ensure("good/one")
        clock.now += 10
        with pytest.raises(InvalidAdapter):
            await stager.ensure(NAME)
        assert set(stager.node.holdings) == {"good/one"}
        assert nothing_half_done(stager)


async def test_of_a_large_bad_archive_little_is_fetched(tmp_path: Path) -> None:
    """The transfer ends at the header of the weights; the same revision is not fetched again."""
    data = packed(".tar", {**BAD, "optimizer.pt": bytes(64 * 2**20)})
    async with running(FaultyServer()) as server, node(tmp_path / "node", web_origin(server.url)) as stager:
        server.files[f"/{NAME}.tar"] = data
        for _ in range(2):
            with pytest.raises(InvalidAdapter, match="lora_A"):
                await stager.ensure(NAME)
        assert server.sent_bytes < len(data) / 2
        assert len(server.gets(f"{NAME}.tar")) == 1


@pytest.mark.parametrize("how", ["a zip", "weights before the configuration", "a checkpoint first"])
async def test_a_bad_archive_that_cannot_be_judged_in_passing_takes_its_own_room_only(
    tmp_path: Path, root: Path, file_origin: OriginSettings, how: str
) -> None:
    """For what it holds, nothing goes."""
    suffix, files = {
        "a zip": (".zip", BAD),
        "weights before the configuration": (".tar.gz", dict(reversed(BAD.items()))),
        "a checkpoint first": (".tar.gz", {**{f"run/checkpoint-1/{path}": data for path, data in LISTED.items()}, **{f"run/{p}": d for p, d in BAD.items()}}),
    }[how]
    data = packed(suffix, files)
    (root / (NAME + suffix)).write_bytes(data)
    write_small(root / "good/one", seed=1)
    clock = Clock()
    async with node(tmp_path / "node", file_origin, clock=clock, max_bytes=size_of(FILES) + on_disk(len(data)), lease_s=1) as stager:
        await stager.ensure("good/one")
        clock.now += 10
        with pytest.raises(InvalidAdapter, match="lora_A"):
            await stager.ensure(NAME)
        assert set(stager.node.holdings) == {"good/one"}
        assert nothing_half_done(stager)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_tar_tells_what_it_begins_with(suffix: str) -> None:
    """The weights as far as they are here. The bytes of a folder's own adapter count, not those of a checkpoint in it."""
    cut = len(packed(".tar", LISTED)) // 2 if suffix == ".tar" else None
    found = archive.beginning(packed(suffix, LISTED)[:cut])
    assert found is not None
    assert (found.config, found.weights_size) == (FILES[CONFIG], len(FILES[WEIGHTS]))
    assert FILES[WEIGHTS].startswith(found.weights)
    assert len(found.weights) >= 100
    checkpoint = [(INFO(f"sql/checkpoint-1/{path}"), data) for path, data in BAD.items()]
    own = [(INFO(f"sql/{path}"), data) for path, data in LISTED.items()]
    found = archive.beginning(tar_of([(special("sql", tarfile.DIRTYPE), b""), *checkpoint, *own], suffix))
    assert found is not None
    assert found.weights == FILES[WEIGHTS]


UNTOLD: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "a zip": lambda: packed(".zip", LISTED),
    "a configuration alone": lambda: packed(".tar", {CONFIG: FILES[CONFIG]}),
    "weights first": lambda: packed(".tar", dict(reversed(LISTED.items()))),
    "a folder that is no member": lambda: packed(".tar", {f"checkpoint-1/{path}": data for path, data in LISTED.items()}),
    "a folder beside another": lambda: tar_of(
        [(special("a", tarfile.DIRTYPE), b""), (INFO("b/x"), b"x"), *((INFO(f"a/{path}"), data) for path, data in LISTED.items())]
    ),
    "a checkpoint alone": lambda: packed(".tar", {"README.md": b"x", **{f"checkpoint-1/{path}": data for path, data in LISTED.items()}}),
    "many members": lambda: packed(".tar", {**{str(number): b"x" for number in range(archive.MAX_HEAD_MEMBERS)}, **LISTED}),
    "a configuration that is cut": lambda: packed(".tar", LISTED)[:600],
    "gzip that is none": lambda: b"\x1f\x8b" + b"x" * 100,
    "a bomb": lambda: gzip.compress(packed(".tar", {"x": bytes(2 * archive.MAX_HEAD_BYTES), **LISTED})),
}


@pytest.mark.parametrize("how", UNTOLD)
def test_a_beginning_may_tell_nothing(how: str) -> None:
    """Then the whole is looked at. A folder above the one that was seen may have the adapter's own configuration."""
    assert archive.beginning(UNTOLD[how]()) is None


# -- room


async def test_room_is_reserved_for_the_archive_and_for_what_it_holds(tmp_path: Path, root: Path, file_origin: OriginSettings) -> None:
    """Both are on disk at once. A block less than that, and there is no room; afterwards only the content counts."""
    data = packed(".tar", FILES)
    (root / f"{NAME}.tar").write_bytes(data)
    needed = on_disk(len(data)) + size_of(FILES)
    async with node(tmp_path / "small", file_origin, max_bytes=needed - 4096) as stager:
        with pytest.raises(NoSpace):
            await stager.ensure(NAME)
        assert nothing_there(stager)
    async with node(tmp_path / "node", file_origin, max_bytes=needed) as stager:
        await stager.ensure(NAME)
        assert stager.node.holdings.index.used_bytes == size_of(FILES)
        assert nothing_half_done(stager)


async def test_what_is_small_packed_and_large_unpacked_is_weighed_unpacked(tmp_path: Path, root: Path, file_origin: OriginSettings) -> None:
    """The node's whole disk has no place for it."""
    large = read_files(write_adapter(tmp_path / "large", seed=0, hidden=2048, layers=16).parent)
    header, data = split(large[WEIGHTS])
    (root / f"{NAME}.zip").write_bytes(packed(".zip", {**large, WEIGHTS: safetensors(header, bytes(len(data)))}))
    async with node(tmp_path / "node", file_origin, max_bytes=2**20) as stager:
        with pytest.raises(AdapterTooLarge, match="the limit of this node"):
            await stager.ensure(NAME)
        assert nothing_there(stager)


async def test_others_go_for_what_it_unpacks_to(tmp_path: Path, root: Path, file_origin: OriginSettings) -> None:
    """Room for the packed form alone would not have needed it."""
    (root / "acme/old.zip").write_bytes(packed(".zip", small_files(seed=1)))
    (root / f"{NAME}.zip").write_bytes(packed(".zip", {**FILES, "x": b""}))
    limit = size_of(FILES) * 2 + on_disk(len(packed(".zip", FILES))) - 4096
    async with node(tmp_path / "node", file_origin, max_bytes=limit, lease_s=0.001) as stager:
        await stager.ensure("acme/old", holder="router")
        stager.release("router")
        await stager.ensure(NAME)
        assert visible(tmp_path / "node") == {NAME: FILES}
        assert nothing_half_done(stager)


async def test_the_limit_of_one_file_holds_in_an_archive(tmp_path: Path, root: Path, file_origin: OriginSettings) -> None:
    """For the weights it is the setting's, for the configuration a megabyte."""
    for path in (WEIGHTS, CONFIG):
        (root / f"{NAME}.zip").write_bytes(packed(".zip", {**FILES, path: b" " * (2**20 + 1)}))
        async with node(tmp_path / f"node-{path}", file_origin, max_file_bytes=2**20) as stager:
            with pytest.raises(AdapterTooLarge, match=path):
                await stager.ensure(NAME)
            assert nothing_there(stager)


async def test_an_archive_over_the_limit_of_one_file_is_not_fetched(tmp_path: Path) -> None:
    """Its own length is stated."""
    async with running(FaultyServer()) as server:
        server.files[f"/{NAME}.tar"] = packed(".tar", {**FILES, "other": bytes(2**20)})
        async with node(tmp_path / "node", web_origin(server.url), max_file_bytes=2**20) as stager:
            with pytest.raises(AdapterTooLarge):
                await stager.ensure(NAME)
            assert nothing_there(stager)
        assert server.gets() == []


# -- what it says of itself is checked like everything else


async def test_a_pinned_digest_is_that_of_the_weights_inside(tmp_path: Path, root: Path, file_origin: OriginSettings) -> None:
    """Not that of the archive, which two tools pack in two ways."""
    (root / f"{NAME}.tgz").write_bytes(packed(".tgz", FILES))
    async with node(tmp_path / "right", file_origin, digests={NAME: sha256(FILES[WEIGHTS])}) as stager:
        await stager.ensure(NAME)
        assert visible(tmp_path / "right") == {NAME: FILES}
    async with node(tmp_path / "wrong", file_origin, digests={NAME: sha256(packed(".tgz", FILES))}) as stager:
        with pytest.raises(InvalidAdapter, match="is pinned"):
            await stager.ensure(NAME)
        assert nothing_there(stager)


@pytest.mark.parametrize("spoilt", [{CONFIG: b"{}"}, {WEIGHTS: FILES[WEIGHTS][:-1]}, {WEIGHTS: b""}])
async def test_what_is_unpacked_is_verified(tmp_path: Path, root: Path, file_origin: OriginSettings, spoilt: dict[str, bytes]) -> None:
    """As if it had come alone."""
    (root / f"{NAME}.zip").write_bytes(packed(".zip", {**FILES, **spoilt}))
    async with node(tmp_path / "node", file_origin) as stager:
        with pytest.raises(InvalidAdapter):
            await stager.ensure(NAME)
        assert nothing_there(stager)


async def test_a_lying_hub_is_found_out_before_its_archive_is_opened(tmp_path: Path) -> None:
    """The archive has a SHA-256 of its own, and the bytes are another archive's of the same length."""
    good, other = packed(".tar", FILES), packed(".tar", small_files(seed=1))
    assert len(good) == len(other)
    async with Hub() as hub:
        hub.add(NAME, {"a.tar": good}, lfs=("*.tar",))
        hub.fault("wrong_bytes", "*/a.tar", times=99)
        async with node(tmp_path / "node", hub_origin(hub.url)) as stager:
            with pytest.raises(InvalidAdapter, match="SHA-256"):
                await stager.ensure(NAME)
            assert nothing_there(stager)
        close_session()


# -- any damage


def unpacked(suffix: str, data: bytes, directory: Path) -> Files:
    """What comes out of an archive, as the stager takes it out."""
    (directory / "in").mkdir(parents=True)
    packed_ = directory / "in" / f"archive{suffix}"
    packed_.write_bytes(data)
    chosen = archive.members(packed_, max_bytes=2**24)
    archive.unpack(packed_, chosen, directory / "in")
    packed_.unlink()
    return read_files(directory / "in")


GOOD_DATA = {
    **{(suffix, "plain"): packed(suffix, FILES) for suffix in (".tar", ".tar.gz", ".zip")},
    **{(suffix, "rich"): packed(suffix, {f"{'ü' * 150}/{path}": data for path, data in FILES.items()}) for suffix in (".tar", ".tar.gz", ".zip")},
    (".zip", "stored"): zip_of(list(FILES.items()), zipfile.ZIP_STORED),
    (".tar", "odd"): tar_of([*((INFO(p), data) for p, data in FILES.items()), (special("s", tarfile.GNUTYPE_SPARSE), b"")], format_=tarfile.GNU_FORMAT),
}


@settings(deadline=None, max_examples=300)
@given(which=st.sampled_from(sorted(GOOD_DATA)), damage=st.lists(st.tuples(st.integers(0, 2**32), st.binary(max_size=8), st.integers(0, 600)), max_size=6))
def test_any_damage_ends_in_invalid_or_in_an_adapter(which: tuple[str, str], damage: list[tuple[int, bytes, int]]) -> None:
    """Bytes replaced, put in or taken out, anywhere: no other error, no other file, and nothing beside the directory."""
    check_damaged(which, damage)


@pytest.mark.parametrize("which", sorted(GOOD_DATA))
def test_bytes_of_the_headers_may_be_damaged(which: tuple[str, str]) -> None:
    """One at a time, as a search by chance finds few of them."""
    length = len(GOOD_DATA[which])
    places = {".tar": [*range(512), *range(1024, 1536)], ".tar.gz": [*range(64)], ".zip": [*range(80), *range(length - 260, length)]}[which[0]]
    chance = random.Random(0)
    for at in chance.sample(places, min(200, len(places))):
        check_damaged(which, [(at, bytes([chance.choice((0, 1, 0x7F, 0x80, 0xFF))]), 1)])


def check_damaged(which: tuple[str, str], damage: list[tuple[int, bytes, int]]) -> None:
    suffix, data = which[0], GOOD_DATA[which]
    for place, new, gone in damage:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + gone :]
    with tempfile.TemporaryDirectory() as parent:
        try:
            found = unpacked(suffix, data, Path(parent) / "a" / "b")
        except InvalidAdapter:
            found = {}
        assert found.keys() <= {CONFIG, WEIGHTS}
        if suffix != ".tar":  # the others have checksums
            assert all(found[path] == FILES[path] for path in found)
        files = {path.relative_to(parent).as_posix() for path in Path(parent).rglob("*") if not path.is_dir() or path.is_symlink()}
        assert files <= {f"a/b/in/{path}" for path in (CONFIG, WEIGHTS, f"archive{suffix}")}
