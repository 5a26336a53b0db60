# SPDX-License-Identifier: Apache-2.0
"""`python -m stages.train curve`: one training per share, equal in steps, and a forecast."""

import json
from pathlib import Path

from tests.runs import make_synth, run


def test_each_share_takes_as_many_steps(tmp_path: Path) -> None:
    make_synth(tmp_path, num_rows=40)
    assert run(tmp_path, "dump").returncode == 0
    flags = [
        "--shares",
        "0.25,0.5,0.9,1",
        "--epochs",
        "2",
        "--ttt_steps",
        "3",
        "--eval_every_steps",
        "5",
    ]
    done = run(tmp_path, "train", "curve", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads((tmp_path / "run" / "curve.json").read_text())
    assert list(made["measured"]) == ["10", "19", "34", "38"]
    assert list(made["forecast"]) == ["76", "380"]
    assert "380 forecast" in done.stderr
    manifests = [
        json.loads((tmp_path / f"run-curve-{n}" / "train" / "manifest.json").read_text())
        for n in made["measured"]
    ]
    assert len({manifest["facts"]["steps"] for manifest in manifests}) == 1
    assert manifests[-1]["config"]["epochs"] == 2
    assert [manifest["facts"]["samples"] for manifest in manifests][-1] == 40
    assert not (tmp_path / "run" / "train").exists()
    assert (tmp_path / "run" / "logs" / "curve.log").exists()
    unwalked = run(tmp_path, "train", "curve", "--holdout_fraction", "0", "--shares", "0.3,0.6,1")
    assert unwalked.returncode == 2
    assert "expected held-out samples to walk, found 0 of the samples" in unwalked.stderr
    assert not (tmp_path / "run-curve-12").exists()
    again = run(tmp_path, "train", "curve", *flags)
    assert again.stderr.count("already done") >= 3
