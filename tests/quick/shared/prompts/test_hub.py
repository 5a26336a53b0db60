# SPDX-License-Identifier: Apache-2.0
"""Data sets on a hub, read by the stage's own command line from a hub on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from tests.quick.shared.prompts.hub import hub

# The libraries wait for seconds between their retries: this process does not.
READ = """
import json, pathlib, sys, time
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))
from shared.cli import _outcome
from shared.errors import EyrieError
from shared.prompts.rows import Prompt
from shared.prompts.sources import Source, read_source
for text in sys.argv[1:]:
    try:
        rows = list(read_source(Source(**json.loads(text)), pathlib.Path("nowhere")))
        found = [r.sample_id if isinstance(r, Prompt) else r.reason for r in rows]
        print(json.dumps({"ids": found, "messages": rows[-1].conversation if rows else []}))
    except Exception as error:
        outcome = _outcome(error)
        print(json.dumps({"exit": outcome.exit_code, "code": outcome.code, "text": str(outcome)}))
"""


class Answer(NamedTuple):
    ids: list[str] | None = None
    messages: list[Any] | None = None
    exit: int = 0
    code: str = ""
    text: str = ""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


SOURCES: dict[str, dict[str, str]] = {
    "lines": {"path": "acme/lines"},
    "test": {"path": "acme/lines", "split": "test"},
    "other split": {"path": "acme/lines", "split": "test_sft"},
    "only validation": {"path": "acme/validation"},
    "parquet": {"path": "acme/parquet"},
    "named": {"path": "ultrachat"},
    "named, other split": {"path": "ultrachat", "split": "test_sft"},
    "script": {"path": "acme/script"},
    "columns differ": {"path": "acme/mixed"},
    "card": {"path": "acme/card"},
    "gated": {"path": "acme/gated"},
    "missing": {"path": "acme/missing"},
    "revision": {"path": "acme/lines", "revision": "v9"},
    "empty": {"path": "acme/empty"},
    "busy": {"path": "acme/busy"},
}


def read(endpoint: str, cache: Path, sources: dict[str, dict[str, str]]) -> dict[str, Answer]:
    """The library reads its endpoint when it is imported, so a process of its own reads the sources."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(json.dumps, sources.values())],
        env=environment,
        cwd=cache.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(sources), done.stderr[-3000:]
    return {name: Answer(**json.loads(line)) for name, line in zip(sources, lines, strict=True)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Answer]]:
    root = tmp_path_factory.mktemp("hub")
    prompts = [{"id": f"r{i}", "prompt": f"What is {i}?"} for i in range(4)]
    write(root / "acme/lines/data/train.jsonl", prompts[:3])
    write(root / "acme/lines/data/test.jsonl", prompts[3:])
    (root / "acme/lines/README.md").write_text("---\nlicense: mit\n---\n# Lines\n")
    write(root / "acme/validation/validation.jsonl", prompts[:1])
    calls = [{"name": "f", "arguments": {"town": "Lyon"}}, {"name": "g", "arguments": {"n": "1"}}]
    table = [
        {
            "id": f"p{i}",
            "messages": [
                {"role": "user", "content": "q", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ],
        }
        for i, call in enumerate(calls)
    ]
    data = root / "acme/parquet/data"
    data.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(table), data / "train-00000-of-00001.parquet")
    for split in ("train_sft", "test_sft"):
        chats = root / "HuggingFaceH4/ultrachat_200k/data"
        chats.mkdir(parents=True, exist_ok=True)
        rows = [{"id": split, "messages": [{"role": "user", "content": split}]}]
        pq.write_table(pa.Table.from_pylist(rows), chats / f"{split}-00000-of-00001.parquet")
    (root / "acme/script").mkdir()
    (root / "acme/script/script.py").write_text("import datasets\n")
    write(root / "acme/mixed/a.jsonl", [{"id": "m1", "prompt": "x"}])
    write(root / "acme/mixed/b.jsonl", [{"id": 2, "prompt": "y", "views": 3}])
    write(root / "acme/card/train.jsonl", prompts[:1])
    (root / "acme/card/README.md").write_text("---\n{: [\n---\n")
    (root / "acme/empty").mkdir()
    (root / "acme/empty/README.md").write_text("# Nothing\n")
    with hub(root) as endpoint:
        yield read(endpoint, tmp_path_factory.mktemp("cache") / "hf", SOURCES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lines", ["r0", "r1", "r2"]),
        ("test", ["r3"]),
        ("only validation", ["r0"]),
        ("parquet", ["p0", "p1"]),
        ("named", ["train_sft"]),
        ("named, other split", ["test_sft"]),
    ],
)
def test_the_rows_of_one_split_are_read(
    answers: dict[str, Answer], name: str, expected: list[str]
) -> None:
    assert answers[name].ids == expected, answers[name]


def test_a_tables_padding_does_not_reach_the_arguments(answers: dict[str, Answer]) -> None:
    messages = answers["parquet"].messages
    assert messages is not None
    assert messages[1]["tool_calls"][0]["function"] == {"name": "g", "arguments": '{"n": "1"}'}


@pytest.mark.parametrize(
    ("name", "exit_code", "code", "words"),
    [
        ("other split", 2, "hub-data-set", "test_sft"),
        ("script", 2, "hub-data-set", "scripts are no longer supported"),
        ("columns differ", 2, "hub-data-set", "column"),
        ("card", 2, "hub-data-set", "acme/card"),
        ("gated", 2, "hub-data-set", "HF_TOKEN"),
        ("missing", 2, "hub-data-set", "acme/missing"),
        ("revision", 2, "hub-data-set", "v9"),
        ("empty", 2, "hub-data-set", "acme/empty"),
        ("busy", 75, "hub-unreachable", "503"),
    ],
)
def test_what_a_hub_refuses_is_an_exit_code_with_the_reason(
    answers: dict[str, Answer], name: str, exit_code: int, code: str, words: str
) -> None:
    answer = answers[name]
    assert (answer.exit, answer.code) == (exit_code, code), answer
    assert words in answer.text


def test_a_hub_out_of_reach_is_75(tmp_path: Path) -> None:
    source = {"lines": {"path": "acme/lines"}}
    answer = read("http://127.0.0.1:9", tmp_path / "hf", source)["lines"]
    assert (answer.exit, answer.code) == (75, "hub-unreachable"), answer
