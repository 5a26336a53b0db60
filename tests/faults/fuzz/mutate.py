# SPDX-License-Identifier: Apache-2.0
"""Damage to a file: cut, flipped, grown, or a well-formed file with the wrong thing at one key.

Everything is drawn from one `random.Random`, so a seed alone gives the same damage again.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

DEEP: Any = json.loads("[" * 300 + "]" * 300)
HUGE = (1 << 40, (1 << 63) - 1, (1 << 64) - 1, 1 << 31)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 1 << 40, 1 << 70, -(1 << 63), 1e308, -0.5, float("nan"),
    float("inf"), "", "0", "x", "a" * 5000, "a\0b", "\ud800", "\x1b[31m\n", "..", "../../etc/passwd",
    "/etc/passwd", "2026-01-01T00:00:00+00:00", [], [None], [1, 2], ["x"], [[]], {}, {"a": 1},
    {"": None}, {"bytes": 1, "sha256": "x"}, DEEP,
)  # fmt: skip
TENSORS: tuple[Callable[[], Any], ...] = (
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.zeros(3, dtype=torch.int64),
    lambda: torch.full((4,), float("nan")),
    lambda: torch.zeros(2, 2, dtype=torch.complex64),
    lambda: torch.zeros(4, 4).to_sparse(),
    lambda: torch.empty(1 << 40, device="meta"),
    lambda: torch.zeros(1).expand(1 << 40),
    lambda: torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), [], (1 << 40,)),
    lambda: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
    lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    lambda: torch.tensor([-1, 1 << 40]),
)


_WORDS = (
    b"[" * 3000, b"{" * 3000, b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"\xff\xfe",
    b"\x00", b'"', b"\\ud800", b"\x1b[2J", b"\n", b",", b"\r\n", b"true", b"{}", b"&a *a",
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside `value`, its own () first."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list):
            found += places(item, (*path, key))
        else:
            found.append((*path, key))
    return found


def at_one_place(chance: random.Random, value: Any, values: tuple[Any, ...]) -> Any:
    """`value` with one part of it replaced, gone, twice or renamed; `value` itself stays."""
    path = chance.choice(places(value))
    chosen = chance.choice(values)
    chosen = chosen() if callable(chosen) else chosen
    if not path:
        return chosen
    root = dict(value) if isinstance(value, dict) else list(value)
    parent = root
    for key in path[:-1]:
        parent[key] = parent[key].copy()
        parent = parent[key]
    how = chance.randrange(8)
    if how == 0:
        del parent[path[-1]]
    elif how == 1 and isinstance(parent, dict):
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
    elif how == 2 and isinstance(parent, list):
        parent.append(parent[path[-1]])
    else:
        parent[path[-1]] = chosen
    return root


def _flip(chance: random.Random, data: bytearray) -> None:
    for _ in range(chance.choice((1, 1, 2, 8))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _overwrite(chance: random.Random, data: bytearray) -> None:
    start, size = chance.randrange(len(data)), chance.choice((1, 2, 4, 8, 64))
    data[start : start + size] = chance.randbytes(size)


def _claim(chance: random.Random, data: bytearray) -> None:
    start, size = chance.randrange(len(data)), chance.choice((4, 8))
    data[start : start + size] = struct.pack("<Q", chance.choice(HUGE))[:size]


def _delete(chance: random.Random, data: bytearray) -> None:
    start = chance.randrange(len(data))
    del data[start : start + chance.choice((1, 2, 16, 256))]


def _repeat(chance: random.Random, data: bytearray) -> None:
    start, size = chance.randrange(len(data)), chance.choice((1, 8, 64, 512))
    part = data[start : start + size]
    place = chance.randrange(len(data))
    data[place:place] = part * chance.choice((1, 2, 20))


def _words(chance: random.Random, data: bytearray) -> None:
    word = chance.choice(_WORDS)
    place = chance.randrange(len(data))
    data[place : place + chance.choice((0, 1, len(word)))] = word


def of_bytes(chance: random.Random, content: bytes) -> bytes:
    """`content` with one to three faults that know nothing of its format."""
    if not content or chance.random() < 0.1:
        return content[: chance.randrange(len(content) + 1)]
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if data:
            chance.choice((_flip, _overwrite, _claim, _delete, _repeat, _words))(chance, data)
    return bytes(data)


def no_file(chance: random.Random, path: Path) -> None:
    """Something else under the name of the file."""
    path.unlink()
    kind = chance.randrange(5)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path.with_name("nowhere"))
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        os.mkfifo(path)
    else:
        path.touch()


def restore(path: Path, content: bytes) -> None:
    """Put the whole file back, whatever lies there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or not path.is_file():
        path.unlink(missing_ok=True)
    path.write_bytes(content)


def damage(chance: random.Random, path: Path, content: bytes, form: str) -> None:
    """Leave a damaged file at `path`.

    Args:
        form: what `content` is: json, lines (of JSON), yaml, tensors (torch.save), or bytes.
    """
    restore(path, content)
    draw = chance.random()
    if draw < 0.03:
        no_file(chance, path)
    elif draw < 0.5 or form == "bytes":
        path.write_bytes(of_bytes(chance, content))
    elif form == "tensors":
        value = torch.load(path, weights_only=True)
        torch.save(at_one_place(chance, value, (*VALUES, *TENSORS)), path)
    elif form == "lines":
        lines = [json.loads(line) for line in content.splitlines()]
        changed = at_one_place(chance, lines, VALUES)
        lines = changed if isinstance(changed, list) else [changed]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif form == "yaml":
        changed = at_one_place(chance, yaml.safe_load(content), VALUES)
        path.write_text(yaml.safe_dump(changed), errors="surrogatepass")
    else:
        text = json.dumps(at_one_place(chance, json.loads(content), VALUES))
        if chance.random() < 0.1:
            text = text.replace(", ", f", {text[1 : text.find(',') + 1]} ", 1)  # a key twice
        path.write_text(text)
