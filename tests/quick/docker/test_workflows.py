# SPDX-License-Identifier: Apache-2.0
"""GitHub's workflows: their schema, what zizmor finds, and that no action floats."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
TOOLS = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def check(*command: str | Path) -> None:
    done = subprocess.run([*command, *WORKFLOWS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_follow_the_schema() -> None:
    assert [path.stem for path in WORKFLOWS] == ["bases", "ci", "release"]
    check(TOOLS / "check-jsonschema", "--builtin-schema", "vendor.github-workflows")
    check(TOOLS / "yamllint", "--strict")


def test_scripts_in_workflows_are_clean() -> None:
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            for step in job.get("steps", ()):
                script = re.sub(r"\$\{\{.*?\}\}", "value", step.get("run", ""))
                done = subprocess.run(
                    [TOOLS / "shellcheck", "--shell=bash", "-"],
                    input=script,
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 0, f"{path.name}: {step.get('name')}: {done.stdout}"


@pytest.mark.skipif(not (TOOLS / "zizmor").exists(), reason="no zizmor in this environment")
def test_zizmor_finds_nothing() -> None:
    check(TOOLS / "zizmor", "--offline", "--no-progress", "--quiet")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_action_is_pinned_by_its_digest_and_rights_are_named(path: Path) -> None:
    text = path.read_text()
    for used in re.findall(r"uses: (\S+)", text):
        assert used.startswith("./") or re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", used), used
    assert re.search(r"^permissions:", text, re.MULTILINE)


def test_every_tier_of_tests_runs_in_ci() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    tiers = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    assert {"quick", "stages", "engine", "containers"} <= tiers
    assert all(f"tests/{tier}" in text for tier in ("stages", "engine", "containers"))
    assert "make test-quick" in text and "make lint" in text and "make demo-compose" in text
