# SPDX-License-Identifier: Apache-2.0
"""validate on a run of bench alone: the artifacts that it needs not are skipped, and no other."""

from pathlib import Path

from shared.paths import RunPaths
from stages.ops.look.validate.artifacts import ARTIFACTS, RunView
from stages.ops.look.validate.findings import FAIL, SKIP
from stages.ops.look.validate.run import validate
from tests.runs import make_bench, write_recipe


def verdicts(workspace: Path, verdict: str) -> list[tuple[str, str]]:
    found = validate(RunView(RunPaths(workspace, "run")), list(ARTIFACTS))
    return [(row.artifact, row.question) for row in found.rows if row.verdict == verdict]


def test_a_head_from_elsewhere_needs_no_artifact_before_its_bench(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    make_bench(tmp_path, head="acme/head")
    assert verdicts(tmp_path, FAIL) == []
    assert verdicts(tmp_path, SKIP) == [(name, "manifest") for name in ARTIFACTS[:-1]]
    (tmp_path / "run" / "export").mkdir()
    assert ("export", "manifest") in verdicts(tmp_path, FAIL)
