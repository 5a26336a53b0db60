# SPDX-License-Identifier: Apache-2.0
"""Files of every format: compressed, with a byte order mark, broken, saved by `datasets`; and folders."""

import bz2
import gzip
import json
import lzma
import subprocess
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import UserError
from shared.prompts.rows import BadRow, Prompt
from shared.prompts.sources import Source, read_source

ROWS = [{"id": f"r{i}", "prompt": f"What is {i}?"} for i in range(3)]
IDS = ["r0", "r1", "r2"]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
USER = {"role": "user", "content": "Hi"}


def read(path: Path, **source: Any) -> list[str]:
    rows = read_source(Source(path=str(path), **source), path.parent)
    return [row.sample_id if isinstance(row, Prompt) else row.reason for row in rows]


def prompts(path: Path) -> list[Prompt]:
    return [
        row for row in read_source(Source(path=str(path)), path.parent) if isinstance(row, Prompt)
    ]


FILES: dict[str, bytes] = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "lines.json": LINES,
    "list.json": json.dumps(ROWS, indent=1).encode(),
    "line.json": json.dumps(ROWS).encode(),
    "list.jsonl": json.dumps(ROWS, indent=1).encode(),
    "object.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "pretty.json": json.dumps({"version": 1, "data": ROWS}, indent=2).encode(),
    "a.csv": b"id,prompt\n" + b"".join(f"{r['id']},{r['prompt']}\n".encode() for r in ROWS),
    "a.tsv": b"id\tprompt\n" + b"".join(f"{r['id']}\t{r['prompt']}\n".encode() for r in ROWS),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.ndjson.xz": lzma.compress(LINES),
    "a.jsonl.zst": pa.compress(LINES, codec="zstd", asbytes=True),
    "A.JSONL": LINES,
    "B.Json.GZ": gzip.compress(LINES),
    "columns.json": json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode(),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_from_every_format(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert read(tmp_path / name) == IDS


@pytest.mark.parametrize("name", ["a.jsonl", "list.json", "line.json", "object.json", "a.csv"])
def test_a_byte_order_mark_is_skipped_in_every_format(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + FILES[name])
    assert read(tmp_path / name) == IDS


def test_surrogates_bytes_and_nan_cost_the_same_in_lines_and_lists(tmp_path: Path) -> None:
    rows = [
        rb'{"id": "half", "prompt": "\ud83d"}',
        b'{"id": "bytes", "prompt": "\xff"}',
        b'{"id": "nan", "prompt": "x", "score": NaN}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "a.json").write_bytes(b"[" + b",\n".join(rows) + b"]")
    expected = ["not_utf8", "not_utf8", "nan"]
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.json") == expected


def test_a_list_is_read_across_the_ends_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.prompts.formats._CHUNK_CHARS", 7)
    rows = [{"id": str(i), "prompt": "é" * i + "x"} for i in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    assert read(tmp_path / "a.json") == [str(i) for i in range(40)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(LINES * 100, mtime=0)[:-40]),
        ("not.jsonl.gz", LINES),
        ("not.jsonl.zst", LINES),
        ("not.jsonl.xz", LINES),
        ("not.parquet", LINES),
        ("not.arrow", LINES),
        ("cut.json", b'[{"prompt": "a"}, {"prompt":'),
        ("more.json", b'[{"prompt": "a"}\n] [1]'),
        ("object.json", b'{\n"data": [\n{"prompt": "a"}'),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as refusal:
        read(tmp_path / name)
    assert refusal.value.code == "prompts-unreadable"


def test_a_table_pads_with_nulls_and_they_are_dropped(tmp_path: Path) -> None:
    def calling(arguments: dict[str, Any]) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}

    rows = [
        {"id": "a", "messages": [USER, calling({"town": "Lyon"})], "prompt": None},
        {"id": "b", "messages": [USER, calling({"amount": "12"})]},
        {"id": "c", "messages": None, "prompt": "another shape of row"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pq.write_table(
        pa.table({"id": ["d"], "messages": [[json.dumps(USER)]]}), tmp_path / "texts.parquet"
    )
    first, second, third = prompts(tmp_path / "a.parquet")
    arguments = [
        p.turns[0].answer["tool_calls"][0]["function"]["arguments"] for p in (first, second)
    ]  # type: ignore[index]
    assert arguments == ['{"town": "Lyon"}', '{"amount": "12"}']
    assert third.messages == ({"role": "user", "content": "another shape of row"},)
    assert prompts(tmp_path / "texts.parquet")[0].messages == (USER,)


def test_ids_are_the_same_text_from_every_column_type(tmp_path: Path) -> None:
    import decimal

    for kind in (pa.int64(), pa.float64(), pa.decimal128(5, 0)):
        table = pa.table({"id": pa.array([decimal.Decimal(7)]).cast(kind), "prompt": ["x"]})
        pq.write_table(table, tmp_path / "a.parquet")
        assert read(tmp_path / "a.parquet") == ["7"], kind
    table = pa.table({"id": pa.array([bytes(16)], pa.binary(16)), "prompt": ["x"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["00000000-0000-0000-0000-000000000000"]


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"a cache of a map")
    assert read(tmp_path / "saved") == IDS
    both = datasets.DatasetDict({"train_sft": saved, "gen": saved.select([1])})
    both.save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both", split="gen") == ["r1"]
    for split in (None, "test"):
        with pytest.raises(UserError, match="found gen, train_sft") as refusal:
            read(tmp_path / "both", split=split)
        assert refusal.value.facts == {"splits": ["gen", "train_sft"]}


def test_a_clone_of_a_hubs_data_set_keeps_its_splits_apart(tmp_path: Path) -> None:
    data = tmp_path / "clone" / "data"
    data.mkdir(parents=True)
    names = ("train_sft-00000-of-00001-3fa8.jsonl", "test_sft-00000-of-00001-9bcd.jsonl")
    for name, row in zip(names, ROWS, strict=False):
        (data / name).write_text(json.dumps(row))
    for name in ("README.md", "dataset_infos.json", ".gitattributes"):
        (tmp_path / "clone" / name).write_text("{}")
    for hidden in (".git", ".cache/huggingface", ".ipynb_checkpoints"):
        (tmp_path / "clone" / hidden).mkdir(parents=True)
        (tmp_path / "clone" / hidden / "a.jsonl").write_bytes(LINES)
    with pytest.raises(UserError, match="expected one split, found test_sft, train_sft"):
        read(tmp_path / "clone")
    assert read(tmp_path / "clone", split="test_sft") == ["r1"]
    assert read(tmp_path / "clone", split="all") == ["r1", "r0"]
    with pytest.raises(UserError, match="expected the split 'test', found test_sft, train_sft"):
        read(tmp_path / "clone", split="test")


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (("train/a.jsonl", "test/a.jsonl"), "test", ["test/a.jsonl"]),
        (("a.jsonl", "dev.jsonl"), None, None),
        (("a.jsonl", "contest.jsonl", "train-1.jsonl"), None, 3),
        (("a.jsonl",), "validation", None),
        (("a.jsonl",), "train", 1),
        (("train_a.jsonl", "train_b.jsonl"), None, 2),
        (("train_a.jsonl", "test_a.jsonl"), "test_a", ["test_a.jsonl"]),
    ],
)
def test_a_files_split_is_in_its_name(
    tmp_path: Path, names: tuple[str, ...], split: str | None, expected: Any
) -> None:
    for name in names:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"id": name, "prompt": name}))
    if expected is None:
        with pytest.raises(UserError) as refusal:
            read(tmp_path / "data", split=split)
        assert refusal.value.code == "prompts-split"
    else:
        found = read(tmp_path / "data", split=split)
        assert found == expected if isinstance(expected, list) else len(found) == expected


def test_linked_folders_are_entered_once_and_what_is_not_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_text(json.dumps(ROWS[1]))
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text(json.dumps(ROWS[0]))
    (data / "disk2").symlink_to(tmp_path / "elsewhere")
    (data / "loop").symlink_to(data)
    (data / "gone.jsonl").symlink_to(tmp_path / "nothing")
    (data / "rows.xlsx").write_bytes(b"PK")
    rows = list(read_source(Source(path="data"), tmp_path))
    assert [row.sample_id for row in rows if isinstance(row, Prompt)] == ["r0", "r1"]
    unread = {row.row: row for row in rows if isinstance(row, BadRow)}
    assert set(unread) == {"gone.jsonl", "rows.xlsx"}
    assert all(row.is_skipped and row.reason == "file_not_read" for row in unread.values())


def test_ids_that_begin_again_in_each_file_stay_apart(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text('{"id": 0, "prompt": "a"}\n{"id": 1, "prompt": "same"}\n')
    (data / "b.jsonl").write_text('{"id": 0, "prompt": "b"}\n{"id": 1, "prompt": "same"}\n')
    assert read(data) == ["0", "1", "b.jsonl:0", "1"], "an equal row keeps its id, a duplicate"


def test_a_fifo_is_refused(tmp_path: Path) -> None:
    subprocess.run(["mkfifo", tmp_path / "a.jsonl"], check=True)
    with pytest.raises(UserError, match="a pipe or a device"):
        read(tmp_path / "a.jsonl")
