"""A hundred adapters that somebody wrote to make a check slow, large or wrong; and a few that are only large, and good.

`hostile(scale)` makes them one by one: the sizes are those that hurt, divided by `scale`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from .adapters import safetensors as file_of

MIB = 2**20
Q = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIGURATION: dict[str, Any] = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@dataclass(frozen=True)
class Hostile:
    """One of them. `complaint` is what its refusal says; "" for those that are fine. The bytes are made when they are asked for."""

    name: str
    config: Callable[[], bytes]
    weights: Callable[[], bytes]
    complaint: str


def configuration(**changes: Any) -> bytes:
    return json.dumps({**CONFIGURATION, **changes}).encode()


def good_weights() -> bytes:
    header = {
        f"{Q}.lora_A.weight": {"dtype": "F16", "shape": [4, 8], "data_offsets": [0, 64]},
        f"{Q}.lora_B.weight": {"dtype": "F16", "shape": [8, 4], "data_offsets": [64, 128]},
    }
    return file_of(header, bytes(128))


def one_tensor(shape: str, *, name: str = f"{Q}.lora_A.weight", dtype: str = '"U8"', offsets: str = "[0,1]") -> bytes:
    """A header with one tensor, each part of it as it is given."""
    return file_of(f'{{"{name}":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'.encode(), b"\1")


def around(text: str) -> bytes:
    """A good header with `text` as one more member."""
    raw = good_weights()
    length = int.from_bytes(raw[:8], "little")
    return file_of(raw[8 : 8 + length - 1] + b"," + text.encode("utf-8", "surrogatepass") + b"}", raw[8 + length :])


def many_tensors(count: int, *, size: int = 1, begin: Callable[[int], int] | None = None, module: str = "x") -> bytes:
    """Pairs of matrices of rank 1, each of `size` bytes."""
    place = begin or (lambda number: number * size)
    texts = [
        f'"model.layers.{n // 2}.{module}.lora_{"AB"[n % 2]}.weight":{{"dtype":"U8","shape":{[1, size] if n % 2 == 0 else [size, 1]},'
        f'"data_offsets":[{place(n)},{place(n) + size}]}}'
        for n in range(count)
    ]
    return file_of(f"{{{','.join(texts)}}}".encode(), bytes(count * size))


def spaced(raw: bytes) -> bytes:
    """The same file with more white space in its header."""
    length = int.from_bytes(raw[:8], "little")
    return file_of(raw[8 : 8 + length].replace(b":{", b" :  {"), raw[8 + length :])


def numbers(count: int) -> str:
    return f"[{','.join(['1'] * count)}]"


def data(value: bytes, size: int, dtype: str = "BF16") -> bytes:
    """One pair of rank 4 whose numbers are all `value`, with `size` bytes together."""
    half = size // 2
    header = {
        f"{Q}.lora_A.weight": {"dtype": dtype, "shape": [4, half // (4 * len(value))], "data_offsets": [0, half]},
        f"{Q}.lora_B.weight": {"dtype": dtype, "shape": [half // (4 * len(value)), 4], "data_offsets": [half, size]},
    }
    return file_of(header, value * (size // len(value)))


def _weights(title: str, complaint: str, make: Callable[..., bytes], *args: Any, **more: Any) -> Hostile:
    return Hostile(title, configuration, partial(make, *args, **more), complaint)


def _config(title: str, complaint: str, make: Callable[..., bytes], *args: Any, **more: Any) -> Hostile:
    return Hostile(title, partial(make, *args, **more), good_weights, complaint)


def hostile(scale: int = 1) -> Iterator[Hostile]:
    """All of them."""
    for kind in KINDS:
        yield from kind(scale)


def _dimensions(scale: int) -> Iterator[Hostile]:
    """Dimensions: their product, multiplied as Python does, once took minutes."""
    yield _weights("9 dimensions", "9 dimensions; the limit is 8", one_tensor, numbers(9))
    yield _weights("1,000 dimensions", "1000 dimensions; the limit is 8", one_tensor, numbers(1000))
    for count in (25_000, 100_000, 1_000_000):
        yield _weights(f"{count:,} dimensions", "broken header|dimensions", lambda count=count: one_tensor(numbers(count // scale + 3000)))
        yield _weights(
            f"{count:,} long dimensions",
            "broken header|dimensions",
            lambda count=count: one_tensor(f"[{','.join([str(2**63 - 1)] * (count // scale + 3000))}]"),
        )
    for count in (2, 3, 8):
        yield _weights(f"{count} dimensions of 2^62", "elements", one_tensor, str([2**62] * count))
    yield _weights("a dimension of 2^63", "elements", one_tensor, f"[{2**63}]")
    yield _weights("no dimension at all", "0 dimensions", one_tensor, "[]")


def _flat_lists(scale: int) -> Iterator[Hostile]:
    """Flat lists, which a JSON parser turns into millions of objects without letting go."""
    for count in (10_000, 1_000_000, 10_000_000):
        size = count // scale + 3000
        yield _weights(f"a header of {count:,} numbers", "does not begin with", lambda size=size: file_of(numbers(size).encode()))
        yield _weights(f"a tensor of {count:,} numbers", "lacks dtype|broken header", lambda size=size: around(f'"x":{numbers(size)}'))
        yield _weights(f"metadata of {count:,} numbers", "made of strings|broken header", lambda size=size: around(f'"__metadata__":{numbers(size)}'))
        yield _weights(f"a metadata value of {count:,} numbers", "made of strings", lambda size=size: around(f'"__metadata__":{{"a":{numbers(size)}}}'))


def _nesting(scale: int) -> Iterator[Hostile]:
    """Nesting."""
    for depth in (1000, 100_000, 1_000_000):
        deep = depth // scale + 1000
        yield _weights(f"lists {depth:,} deep", "broken header", lambda deep=deep: around('"x":' + "[" * deep + "]" * deep))
        yield _weights(f"objects {depth:,} deep", "broken header|dtype", lambda deep=deep: file_of(b'{"a":' * deep + b"1" + b"}" * deep))
        yield _weights(f"metadata {depth:,} deep", "made of strings", lambda deep=deep: around('"__metadata__":{"a":' + "[" * deep + "]" * deep + "}"))
    for depth, said in ((100, ""), (100_000, "nested"), (400_000, "nested")):
        nested = b"[" * depth + b"]" * depth
        yield _config(f"a configuration {depth:,} deep", said, lambda nested=nested: configuration()[:-1] + b',"x":' + nested + b"}")


def _names(scale: int) -> Iterator[Hostile]:
    """Names."""
    for length in (2000, 20_000, 1_000_000):
        yield _weights(f"a name of {length:,} characters", "broken header|characters", lambda length=length: one_tensor("[1,1]", name="x" * length))
        yield _weights(
            f"a module of {length:,} parts", "broken header|characters", lambda length=length: one_tensor("[1,1]", name="x." * length + "lora_A.weight")
        )
    yield _weights("a name of 1,000 characters", "has rank 1", one_tensor, "[1,1]", name="x" * 980 + ".lora_A.weight")
    yield _weights("a name of 500 parts", "has rank 1", one_tensor, "[1,1]", name="x." * 490 + "lora_A.weight")
    yield _weights("a name of dots", "alone|rank", one_tensor, "[1,1]", name="." * 900 + "lora_A.weight")
    yield _weights("a name with line breaks", "tensors that are no LoRA matrices", one_tensor, "[1]", name="a\\nERROR all is lost\\r\\u001b[31m")
    yield _weights("a name that is empty", "tensors that are no LoRA matrices", one_tensor, "[1]", name="")
    yield _weights("an unpaired surrogate", "broken header", one_tensor, "[1]", name="\\ud800")
    yield _weights("bytes that are no UTF-8", "UTF-8", lambda: file_of(b'{"\xff\xfe":1}'))
    yield _weights("a name of emoji", "broken header|characters", lambda: one_tensor("[1]", name="\U0001f999" * (4 * MIB // scale)))


def _ranges(scale: int) -> Iterator[Hostile]:
    """Ranges."""
    yield _weights("every tensor at the same place", "where another does", lambda: many_tensors(100_000 // scale, begin=lambda _: 0))
    yield _weights("each tensor overlapping the next", "goes on", lambda: many_tensors(100_000 // scale, size=2, begin=lambda n: n))
    yield _weights("a hole before each tensor", "was expected", lambda: many_tensors(100_000 // scale, begin=lambda n: 2 * n + 1))
    yield _weights("ranges at the end of all numbers", "does not take", one_tensor, "[1]", offsets=f"[0,{2**63 - 1}]")
    yield _weights("ranges beyond all numbers", "too late|does not take", one_tensor, "[1]", offsets=f"[{2**64},{2**64 + 1}]")
    yield _weights("a range backwards", "ends before it begins", one_tensor, "[1]", offsets="[1,0]")
    yield _weights("a range of a thousand numbers", "whole numbers", one_tensor, "[1]", offsets=numbers(1000))


def _numbers(_scale: int) -> Iterator[Hostile]:
    """Numbers."""
    for number in ("1e400", "-1", "1.5", "NaN", "true", "null", '"4"', "9" * 4000):
        yield _weights(f"a shape of {number[:6]}", "whole numbers|elements|broken header", one_tensor, f"[{number}]")
        yield _weights(f"a range of {number[:6]}", "whole numbers|too late|broken header|ends before", one_tensor, "[1]", offsets=f"[0,{number}]")


def _repeated_and_long(scale: int) -> Iterator[Hostile]:
    """The same name twice, texts, white space."""
    yield _weights("a tensor twice", "appears twice", lambda: around(f'"{Q}.lora_A.weight":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'))
    yield _weights(
        "a tensor twice by an escape", "appears twice", lambda: around(f'"\\u0062{Q[1:]}.lora_A.weight":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}')
    )
    yield _weights("a dtype twice", "broken header", lambda: around('"x":{"dtype":"U8","dtype":"F16","shape":[0],"data_offsets":[0,0]}'))
    yield _weights("metadata twice", "appears twice", lambda: around('"__metadata__":{},"__metadata__":null'))
    yield _weights("a metadata value of a million characters", "", lambda: around(f'"__metadata__":{{"a":"{"x" * (MIB // scale)}"}}'))
    yield _weights(
        "a metadata value of 30 MiB", "1048576 characters|broken header", lambda: around(f'"__metadata__":{{"a":"{"x" * (30 * MIB // scale + MIB)}"}}')
    )
    yield _weights(
        "a million metadata values", "over 10000 entries", lambda: around('"__metadata__":{' + ",".join(f'"{n}":""' for n in range(MIB // scale)) + "}")
    )
    yield _weights("metadata of escapes", "", lambda: around(f'"__metadata__":{{"a":"{chr(92) + "u00e9"}{(chr(92) + "n") * (MIB // scale // 2)}"}}'))
    yield _weights("30 MiB of white space", "white space", lambda: file_of(b"{" + b" " * (30 * MIB) + good_weights()[9:-128], good_weights()[-128:]))
    yield _weights("white space behind the header", "white space", lambda: file_of(good_weights()[8:-128] + b"\n" * (30 * MIB), good_weights()[-128:]))
    yield _weights("a dtype of a million characters", "broken header", lambda: one_tensor("[1]", dtype=f'"{"F" * MIB}"'))
    yield _weights("a dtype that is an object", "unknown dtype", one_tensor, "[1]", dtype="{}")


def _many(scale: int) -> Iterator[Hostile]:
    """How many."""
    yield _weights("140,000 tensors", "has rank 1", lambda: many_tensors(140_000 // scale))
    yield _weights("140,000 tensors backwards", "has rank 1", lambda: many_tensors(140_000 // scale, begin=lambda n: 140_000 // scale - 1 - n))
    yield _weights("100,000 tensors in unusual writing", "another way" if scale == 1 else "has rank 1", lambda: spaced(many_tensors(100_000 // scale)))
    yield _weights("250,000 tensors", "over 150000 tensors" if scale == 1 else "has rank 1", lambda: many_tensors(250_000 // scale))
    yield _weights("100,000 empty tensors", "is empty", lambda: many_tensors(100_000 // scale, size=0, begin=lambda _: 0))

    several = partial(configuration, r=1, rank_pattern={f"m{n}": n + 1 for n in range(60_000)})
    yield Hostile("60,000 ranks and 100,000 experts in one tensor", several, lambda: many_tensors(2 * (50_000 // scale), module="experts"), "is without")

    def targets_and_tensors(count: int) -> Hostile:
        targets = [f"module{n}" for n in range(count // scale)]
        return Hostile(
            f"{count:,} targets and as many tensors", partial(configuration, r=1, target_modules=targets), lambda: many_tensors(2 * (count // scale)), ""
        )

    yield from map(targets_and_tensors, (2000, 20_000, 60_000))


def _lengths(_scale: int) -> Iterator[Hostile]:
    """Lengths of the header."""
    for length in (2**64 - 1, 2**63, 33 * MIB, 129, 10**8):
        yield _weights(f"a header of {length} bytes", "cut short", lambda length=length: length.to_bytes(8, "little") + good_weights()[8:136])
    yield _weights("a header of 33 MiB", "the limit is", lambda: file_of(b"{" + b" " * (33 * MIB), b""))
    yield _weights("a header of nothing", "does not begin", lambda: bytes(8))
    yield _weights("no bytes at all", "no safetensors header", lambda: b"")


def _something_else(_scale: int) -> Iterator[Hostile]:
    """What is something else."""
    for name, raw, said in (
        ("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        ("a web page", b"<!DOCTYPE html><html>" + b"x" * 1000, "web page"),
        ("an error of an object store", b"<?xml version='1.0'?><Error/>", "XML"),
        ("a zip", b"PK\3\4" + bytes(1000), "zip archive"),
        ("a pickle", b"\x80\x04\x95" + bytes(1000), "cut short|begin"),
        ("a gzip", b"\x1f\x8b\x08" + bytes(1000), "cut short|begin"),
    ):
        yield _weights(f"{name} as weights", said, lambda raw=raw: raw)
        yield _config(f"{name} as configuration", said if said[0] in "GwXz" else "is not", lambda raw=raw: raw)


def _configurations(scale: int) -> Iterator[Hostile]:
    """The configuration."""
    yield _config("a configuration of lists", "", lambda: configuration(x=[[]] * (250_000 // scale)))
    yield _config("a configuration of a key", "", lambda: configuration(**{"x" * (MIB // scale // 2): 1}))
    yield _config("a configuration of 60,000 keys", "", lambda: configuration(**{f"k{n}": 1 for n in range(60_000 // scale)}))
    yield _config("modules to save of lists", "modules_to_save", lambda: configuration(modules_to_save=[[]] * (200_000 // scale + 30_000)))
    yield _config("a rank pattern of lists", "rank_pattern", lambda: configuration(rank_pattern={"a": [[]] * (200_000 // scale)}))
    yield _config("a rank pattern that backtracks", "", lambda: configuration(rank_pattern={"(a+)+$" * 1000: 4}, target_modules="(.*)*x" * 1000))
    yield _config("60,000 ranks", "", lambda: configuration(rank_pattern={f"m{n}": 4 for n in range(60_000 // scale)}))
    yield _config("a rank of 300 digits", "has", lambda: configuration(r=10**300))
    yield _config("a scale of 400 digits", "has", lambda: configuration(lora_alpha=10**400))
    yield _config("a rank of an object", "has r of type", lambda: configuration(r={"a": [1] * 1000}))
    yield _config("a base of half a megabyte", "", lambda: configuration(base_model_name_or_path="b" * 60_000))
    yield _config("a method of 60,000 characters", "other methods", lambda: configuration(peft_type="X" * 60_000))


def _data(scale: int) -> Iterator[Hostile]:
    """Data: what the search for infinities finds only after a second look at each number."""
    yield _weights("numbers just below infinity", "", lambda: data(b"\x7f\x7f", 32 * MIB // scale))
    yield _weights("one NaN behind numbers just below infinity", "holds an infinity", lambda: data(b"\x7f\x7f", 32 * MIB // scale)[:-2] + b"\xc0\x7f")
    yield _weights("infinities", "holds an infinity", lambda: data(b"\x80\x7f", MIB))
    yield _weights("halves of NaN in another type", "", lambda: data(b"\xff\x7b", 4 * MIB // scale, "F16"))


KINDS = (_dimensions, _flat_lists, _nesting, _names, _ranges, _numbers, _repeated_and_long, _many, _lengths, _something_else, _configurations, _data)
