# SPDX-License-Identifier: Apache-2.0
"""Files and folders that lose rows in silence where a reader is careless."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import UserError
from shared.prompts.rows import BadRow, Prompt, Turn
from shared.prompts.sources import Source, read_source

LINE = b'{"prompt": "cat"}\n'


def read(path: Path, **more: str) -> list[Prompt | BadRow]:
    return list(read_source(Source.model_validate({"path": str(path), **more}), path.parent))


def said(path: Path) -> list[str]:
    """Each row's first question, or why there is none."""
    rows = read(path)
    return [r.reason if isinstance(r, BadRow) else r.messages[0]["content"] for r in rows]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.csv", b'prompt,category\n"cat,x\ndog,y\n', "unexpected end of data"),
        ("a.tsv", b'prompt\tcategory\n"cat\tx\ndog\ty\n', "unexpected end of data"),
        ("a.csv", b"prompt,response,prompt\ncat,chat,dog\n", "two columns of one name"),
        ("a.jsonl", gzip.compress(LINE, mtime=0), "gzip"),
        ("a.jsonl", b"PAR1" + LINE, "Parquet"),
        ("a.json", b"PK\x03\x04" + LINE, "zip"),
        ("a.jsonl", LINE.decode().encode("utf-16"), "UTF-16"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_file_of_which_rows_would_be_lost_is_refused(
    name: str, content: bytes, why: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=why) as refused:
        read(tmp_path / name)
    assert refused.value.code == "prompts-unreadable"


def test_a_line_of_more_cells_than_columns_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,response\nHi, you,Hello\ncat,chat\ndog\n")
    assert said(tmp_path / "a.csv") == ["ragged_row", "cat", "dog"]


def test_a_key_that_stands_twice_costs_its_row(tmp_path: Path) -> None:
    twice, once = '{"prompt": "cat", "prompt": "dog"}', '{"prompt": "cat"}'
    (tmp_path / "a.jsonl").write_text(f"{twice}\n{once}\n")
    (tmp_path / "a.json").write_text(f"[\n{twice},\n{once}]")
    for name in ("a.jsonl", "a.json"):
        assert said(tmp_path / name) == ["broken_json", "cat"]


def test_one_line_that_is_a_list_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps([{"prompt": "cat"}, {"prompt": "dog"}]))
    assert said(tmp_path / "a.jsonl") == ["cat", "dog"]


@pytest.mark.parametrize("name", ["test1.jsonl", "split=test/a.jsonl", "test-2024.jsonl"])
def test_splits_of_numbered_files_and_of_partitions(name: str, tmp_path: Path) -> None:
    for each in (name, name.replace("test", "train")):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        (tmp_path / each).write_bytes(LINE)
    with pytest.raises(UserError, match="expected one split, found test, train"):
        read(tmp_path)
    assert len(read(tmp_path, split="test")) == 1


def test_names_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE.replace(b"prompt", b'id": 1, "prompt'))
    for name, content in (
        (
            b"\xff.jsonl",
            b"{\n" + LINE.replace(b"prompt", b'id": 1, "prompt').replace(b"cat", b"dog"),
        ),
        (b"\xff\n.txt", b""),
    ):
        (tmp_path / os.fsdecode(name)).write_bytes(content)
    rows = read(tmp_path)
    names = [row.row if isinstance(row, BadRow) else row.sample_id for row in rows]
    assert sorted(names) == ["1", "\\udcff.jsonl line 1", "\\udcff.jsonl:1", "\\udcff\\n.txt"]


@pytest.mark.parametrize("key", ["subset", "revision"])
def test_what_only_a_hub_has_is_refused_of_files(key: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE)
    with pytest.raises(UserError, match=f"expected no {key}"):
        read(tmp_path / "a.jsonl", **{key: "en"})


def test_arrows_json_is_read_by_its_type(tmp_path: Path) -> None:
    """A content of several types: the texts among them are JSON, too."""
    storage = pa.array(['"cat"', '[{"type": "text", "text": "chat"}]', '""'], pa.string())
    contents = pa.ExtensionArray.from_storage(pa.json_(), storage)
    calls = ["null", "null", '[{"name": "f", "arguments": {"town": null, "days": 2}}]']
    messages = pa.StructArray.from_arrays(
        [
            pa.array(["user", "assistant", "assistant"]),
            contents,
            pa.ExtensionArray.from_storage(pa.json_(), pa.array(calls)),
        ],
        ["role", "content", "tool_calls"],
    )
    rows = pa.ListArray.from_arrays([0, 2], messages.slice(0, 2))
    pq.write_table(pa.table({"messages": rows}), tmp_path / "a.parquet")
    (row,) = read(tmp_path / "a.parquet")
    assert isinstance(row, Prompt)
    answer = {"role": "assistant", "content": "chat"}
    assert row.turns == (Turn(({"role": "user", "content": "cat"},), answer),)

    pair = pa.concat_arrays([messages.slice(0, 1), messages.slice(2, 1)])
    rows = pa.ListArray.from_arrays([0, 2], pair)
    pq.write_table(pa.table({"messages": rows}), tmp_path / "b.parquet")
    (row,) = read(tmp_path / "b.parquet")
    assert isinstance(row, Prompt) and row.turns[0].answer is not None
    function = row.turns[0].answer["tool_calls"][0]["function"]
    assert json.loads(function["arguments"]) == {"town": None, "days": 2}  # a null that was said


README = """---
license: mit
configs:
- config_name: en
  data_files: en/*.jsonl
- config_name: fr
  data_files: [{split: train, path: fr/a.jsonl}, {split: test, path: ["fr/b*"]}]
- config_name: de
  data_dir: de
---
# Cats
"""


def test_a_clones_subsets_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    for name in ("en/a.jsonl", "fr/a.jsonl", "fr/b.jsonl", "de/x/a.jsonl", "old.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name}))

    def names(**more: str) -> list[str]:
        return [r.messages[0]["content"] for r in read(tmp_path, **more) if isinstance(r, Prompt)]

    for given, found in (({}, "en, fr, de"), ({"subset": "it"}, "'it'")):
        with pytest.raises(UserError, match=found) as refused:
            read(tmp_path, **given)
        assert refused.value.code == "prompts-subset"
    assert names(subset="en") == ["en/a.jsonl"]
    assert names(subset="de") == ["de/x/a.jsonl"]
    assert names(subset="fr", split="test") == ["fr/b.jsonl"]
    assert [row.reason for row in read(tmp_path, subset="en") if isinstance(row, BadRow)] == [
        "file_not_read"
    ] * 4
    (tmp_path / "README.md").write_text(README.replace("name: fr", "name: fr\n  default: true"))
    assert names(split="train") == ["fr/a.jsonl"]


@pytest.mark.parametrize("readme", ["# Cats", "---\nlicense: mit\n---\n", "---\n{: [\n---\n"])
def test_a_readme_without_subsets_changes_nothing(readme: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(readme)
    (tmp_path / "a.jsonl").write_bytes(LINE)
    assert len(read(tmp_path)) == 1


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["cat"]), pa.array(["dog"])], names=["prompt"] * 2)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="two columns of one name"):
        read(tmp_path / "a.parquet")
