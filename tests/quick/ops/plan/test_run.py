# SPDX-License-Identifier: Apache-2.0
"""plan as a command: where it finds a model, what it shows and writes."""

import json
from pathlib import Path

import pytest
import yaml

from shared.config import build
from shared.errors import UserError
from stages.ops.config import PlanConfig
from stages.ops.plan.run import read_model, run
from tests.quick.ops.plan.well_known import CONFIGS, plan_of


def test_a_model_is_a_folder_a_file_or_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert read_model("m", tmp_path)[0] == tmp_path / "m" / "config.json"
    assert read_model("m/config.json", tmp_path)[0] == tmp_path / "m" / "config.json"
    with pytest.raises(UserError, match="found neither"):
        read_model("n", tmp_path)


def test_the_command_shows_everything_and_writes_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"model": str(CONFIGS / "gpt-oss-20b.json"), "out": str(tmp_path / "r.yaml")}
    flags["gpu"] = "H200"
    run(build(PlanConfig, flags))
    shown = capsys.readouterr().out
    for part in (
        "20,914,757,184",
        "TIKTOKEN_RS_CACHE_DIR",
        "SpecForge",
        "GB200",
        "2.4 TB",
        "expected: 50,000 rows",
    ):
        assert part in shown
    planned = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert planned["train"]["intermediate_size"] == 11520
    assert planned["bench"]["min_acceptance_length"] == 1.7
    run(build(PlanConfig, {**flags, "json": "true"}))
    shown = capsys.readouterr().out
    assert json.loads(shown)["weight_bytes"] == plan_of("gpt-oss-20b").weights.bytes
    with pytest.raises(UserError, match="expected one of H100, H200"):
        run(build(PlanConfig, {**flags, "gpu": "H1"}))
