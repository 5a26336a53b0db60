# SPDX-License-Identifier: Apache-2.0
"""The hub's prompts where a hub on loopback answers, our own where none does, and the same ever after."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import UserError
from stages.demo import run
from stages.demo.config import RealTargetConfig
from stages.demo.real import target
from stages.demo.real.on_hub import DATA_SETS, _share
from stages.demo.real.prompts import Asked, choose_prompts
from tests.conftest import ROOT
from tests.quick.shared.prompts.hub import hub

# The target's own part is left out; the libraries read the hub's address when they are imported.
COMMAND = """
import runpy, sys
from stages.demo.real import target
target.make_real_target = lambda out, **_: out.mkdir(exist_ok=True) or target.Origin("none", "0")
runpy.run_module("stages.demo", run_name="__main__")
"""


def real_target(out: Path, endpoint: str, *flags: str) -> str:
    """What `real-target` says, without the target."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(out.parent / "hf")}
    environment |= {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", COMMAND, "real-target", str(out), "--num_prompts", "20"]
    done = subprocess.run(
        [*command, "--num_held_out", "6", *flags],
        env=environment,
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).open()]


def asked(rows: list[dict[str, Any]]) -> set[str]:
    return {row["messages"][0]["content"] for row in rows}


def a_hub(root: Path) -> Path:
    """Both data sets, in the layout and under the commits of the real ones."""
    for number, (split, count) in enumerate((("train", 30), ("test", 10))):
        rows = [
            {"question": f"{split} {i}?", "answer": f"{i} #### {i}"} for i in range(count - number)
        ]
        rows += [{"question": "in both", "answer": "#### 1"}]
        (root / "openai/gsm8k/main").mkdir(parents=True, exist_ok=True)
        path = root / f"openai/gsm8k/main/{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    (root / "openai/gsm8k/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train-*}\n"
        "  - {split: test, path: main/test-*}\n---\n"
    )
    dolly = root / "databricks/databricks-dolly-15k"
    dolly.mkdir(parents=True)
    instructions = [
        {"instruction": f"Say {i}", "context": "", "response": "r", "category": "open_qa"}
        for i in range(30)
    ]
    instructions += [{**instructions[0], "instruction": "Sum up", "context": "long " * 500}]
    (dolly / "databricks-dolly-15k.jsonl").write_text("\n".join(map(json.dumps, instructions)))
    for each in (source for data in DATA_SETS["broad"] for source in data.sources):
        (root / f"{each.path}.commit").write_text(str(each.revision))
    return root


def test_a_hub_s_prompts_are_taken_and_kept(tmp_path: Path) -> None:
    with hub(a_hub(tmp_path / "hub")) as endpoint:
        said = real_target(tmp_path / "narrow", endpoint)
        real_target(tmp_path / "broad", endpoint, "--domain", "broad")
        real_target(tmp_path / "own", endpoint, "--prompts", "own")
        real_target(tmp_path / "given", endpoint, "--prompts", "databricks/databricks-dolly-15k")
    names = [
        f"openai/gsm8k@740312add88f781978c0658806c59bc2815b9866/main/{split}"
        for split in ("train", "test")
    ]
    assert f"20 prompts to train on and 6 held out, of {', '.join(names)}" in said
    training, held_out = (read(tmp_path / "narrow", f) for f in ("prompts.jsonl", "held_out.jsonl"))
    assert json.loads((tmp_path / "narrow" / "prompts.json").read_text())["taken_from"] == names
    assert all(row["category"] == "gsm8k" for row in training)
    assert not asked(training) & asked(held_out)
    assert all(text.startswith("test ") or text == "in both" for text in asked(held_out))

    training, held_out = (read(tmp_path / "broad", f) for f in ("prompts.jsonl", "held_out.jsonl"))
    assert [row["category"] for row in training] == ["gsm8k", "open_qa"] * 10
    assert [row["category"] for row in held_out] == ["gsm8k", "open_qa"] * 3
    assert not asked(training) & asked(held_out)
    assert all(len(text) < 2000 for text in asked(training) | asked(held_out))

    assert {row["category"] for row in read(tmp_path / "own", "prompts.jsonl")} == {"problem"}
    assert {row["category"] for row in read(tmp_path / "given", "prompts.jsonl")} == {"open_qa"}

    # Nobody answers by now.
    before = {path: path.read_bytes() for path in (tmp_path / "narrow").iterdir()}
    assert "are kept, of openai/gsm8k@" in real_target(tmp_path / "narrow", "http://127.0.0.1:9")
    assert {path: path.read_bytes() for path in (tmp_path / "narrow").iterdir()} == before


def test_where_no_hub_answers_they_are_written_and_stay(tmp_path: Path) -> None:
    said = real_target(tmp_path / "out", "http://127.0.0.1:9")
    assert "Retrying" not in said  # as the libraries do, for half a minute
    assert [line for line in said.splitlines() if "hub" in line and "WARNING" in line] == [
        line for line in said.splitlines() if "WARNING" in line
    ]
    assert said.count("Writing prompts of our own") == 1
    assert "20 prompts to train on and 6 held out, of our own templates, by seed 0" in said
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "prompts.json").unlink()  # as an earlier version left it
    with hub(a_hub(tmp_path / "hub")) as endpoint:
        real_target(tmp_path / "out", endpoint)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_wrong_path_is_refused_before_the_target_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        pytest.fail("fetched")

    monkeypatch.setattr(target, "make_real_target", never)
    (tmp_path / "mine.jsonl").write_text('{"text": "no prompt"}\n')
    wrong = dict.fromkeys(("nowhere.jsonl", "data/nowhere.jsonl"), "prompts-not-found")
    wrong["mine.jsonl"] = "prompts-no-prompt"
    for given, code in wrong.items():
        with pytest.raises(UserError) as refused:
            run.run_real(RealTargetConfig(out=tmp_path / "out", workspace=tmp_path, prompts=given))
        assert refused.value.code == code
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_no_hub_gives_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    given = Asked("acme/lines", tmp_path, domain="narrow", rows=9, held_out=3, seed=0)
    with pytest.raises(
        Exception, match="no file or folder here, and the hub has not given it"
    ) as error:
        choose_prompts(tmp_path, given)
    assert getattr(error.value, "code", "") == "hub-unreachable"


def test_a_count_in_parts() -> None:
    assert [_share(5, number, 2) for number in (0, 1)] == [3, 2]
    assert _share(1, 1, 2) == 0
