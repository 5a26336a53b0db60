# SPDX-License-Identifier: Apache-2.0
"""Recipes and rows that somebody made to break the reader: refused at once, and at no cost to others."""

import json
import os
import time
from pathlib import Path

import pytest

from shared.artifacts.manifest import read_manifest
from shared.errors import UserError
from shared.prompts.content import Unusable
from shared.prompts.formats import parse_json
from shared.prompts.rows import Prompt, parse_row
from shared.prompts.sources import Source, read_source
from shared.settings import build
from stages.synth.config import SynthConfig

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)


RECIPES = {
    "alias bomb": BOMB,
    "merge bomb": MERGES,
    "itself": "run: &r {a: *r}",
    "deep": "[" * 100_000,
    "date": "run: {target: 2026-99-99}",
    "tag": "run: !!timestamp no",
    "flag": "run: !!bool perhaps",
    "number": "run: !!int " + "9" * 5000,
    "python": "run: !!python/object/apply:os.system [true]",
    "twice": "run: {target: a, target: b}",
    "bytes": b"\xff\xfe\xff",
    "nul": b"run: \0",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_unfolds_or_breaks_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path, content = tmp_path / "recipe.yaml", RECIPES[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    began = time.process_time()  # a machine that is busy otherwise says nothing about the reader
    with pytest.raises(UserError, match=r"recipe\.yaml.*(not valid YAML|UTF-8)"):
        build(SynthConfig, {"recipe": str(path)})
    assert time.process_time() - began < 5


def test_a_recipe_may_use_an_alias(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("run: &r {target: t}\nsynth: {prompts: p, server_env: {A: &x b, B: *x}}\n")
    config = build(SynthConfig, {"recipe": str(path)})
    assert config.server_env == {"A": "b", "B": "b"}


DEEP = "[" * 900 + "]" * 900


LINES = {
    b'{"prompt": ' + b"[" * 10**6: "broken_json",
    b'{"prompt": "x", "tools": [{"a": %s}]}' % DEEP.encode(): None,
    b'{"prompt": "x", "n": ' + b"1" * 5000 + b"}": "broken_json",
    b'{"messages": [{"role": %s, "content": ""}]}' % DEEP.encode(): "unknown_role",
    b'{"prompt": "x", "response": "\\ud800"}': "not_utf8",
    b'{"prompt": "x", "tools": [{"name": "\\ud800"}]}': "not_utf8",
    b'{"prompt": "x", "category": "\\ud800"}': "not_utf8",
}


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_hostile_line_costs_only_itself(line: bytes) -> None:
    try:
        prompt = parse_row(parse_json(line))
    except Unusable as refused:
        assert refused.reason == (LINES[line] or "broken_tools")
    else:
        assert LINES[line] is None
        assert json.dumps(prompt.content_hash())


def test_a_line_without_end_fills_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.prompts.formats._MAX_ROW_BYTES", 1000)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "%s"}\n{"id": "b", "prompt": "x"}\n' % (b"x" * 5000))
    long, whole = read_source(Source(path="p.jsonl"), tmp_path)
    assert not isinstance(long, Prompt)
    assert long.reason == "line_too_long"
    assert isinstance(whole, Prompt)


def test_json_that_claims_gigabytes_or_is_no_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with path.open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(UserError, match="expected at most"):
        read_manifest(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="found a pipe"):
        read_manifest(tmp_path)
