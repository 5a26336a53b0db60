# SPDX-License-Identifier: Apache-2.0
"""`ops adapt` whole, on real vLLM: a head that learned little, the demo's prompts as the traffic."""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shared.contracts.conversations import read_conversations
from shared.io.files import sha256
from tests.conftest import ROOT, ops, train
from tests.engine.conftest import RECIPE, Demo, beside

pytestmark = pytest.mark.engine

ADAPT = ROOT / "compose" / "recipes" / "adapt" / "recipe.yaml"
TRAFFIC_ROWS = 300
FEW_STEPS = "8"


@pytest.fixture(scope="module")
def workspace(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's target, and in the run `early` a head of eight steps on the demo's dump."""
    folder = beside(demo, tmp_path_factory.mktemp("adapt"))
    own = ("--name", "early", "--dump_of", "demo", "--max_steps", FEW_STEPS)
    assert train(folder, "--recipe", str(RECIPE), *own).returncode == 0
    lines = (demo.target / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "traffic.jsonl").write_text("".join(lines[:TRAFFIC_ROWS]))
    return folder


def adapt(workspace: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    words = ("--recipe", str(ADAPT), "--head", "early/export", "--traffic", "traffic.jsonl")
    return ops(workspace, "adapt", *words, *flags)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir()}


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What `ops adapt` left and said."""

    workspace: Path
    served: dict[str, str]  # hashes of the old head's files, before
    stdout: str

    @property
    def result(self) -> dict[str, Any]:
        return dict(json.loads((self.workspace / "adapted" / "adapt.json").read_text()))


@pytest.fixture(scope="module")
def adapted(workspace: Path) -> Adapted:
    served = hashes(workspace / "early" / "export")
    done = adapt(workspace)
    assert done.returncode == 0
    return Adapted(workspace, served, done.stdout)


def test_a_head_that_learned_little_gains_on_its_traffic(adapted: Adapted) -> None:
    result = adapted.result
    assert result["improved"] and result["after"] > 1.3 * result["before"]
    low, high = result["gain_interval"]
    assert 0 < low < result["gain"] < high
    head, report = (adapted.workspace / "adapted" / name for name in ("export", "bench"))
    last = adapted.stdout.splitlines()[-1]
    gained = f"adapted: acceptance_length={result['before']:.2f}->{result['after']:.2f} gain=+"
    assert last.startswith(gained)
    assert last.endswith(f" head={head} report={report / 'report.json'}")


def test_it_is_measured_on_what_it_did_not_learn_from(adapted: Adapted) -> None:
    measured = []
    for run in ("adapted-before", "adapted"):
        raw = json.loads((adapted.workspace / run / "bench" / "raw" / "head.json").read_text())
        measured.append({row["id"] for row in raw["loads"][0]["segments"][0]["requests"]})
    assert measured[0] and measured[0] == measured[1]
    learned = read_conversations(adapted.workspace / "adapted" / "synth")
    assert len(measured[0]) + len({row.conversation_id for row in learned}) == TRAFFIC_ROWS
    assert not measured[0] & {row.conversation_id for row in learned}


def test_a_gain_that_was_not_reached_is_refused_and_the_old_head_is_as_it_was(
    adapted: Adapted,
) -> None:
    made = hashes(adapted.workspace / "adapted" / "export")
    refused = adapt(adapted.workspace, "--min_gain", "3")
    assert refused.returncode == 3
    assert not adapted.result["improved"]
    assert hashes(adapted.workspace / "adapted" / "export") == made  # nothing was done again
    assert hashes(adapted.workspace / "early" / "export") == adapted.served
