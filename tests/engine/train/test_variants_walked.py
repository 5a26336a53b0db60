# SPDX-License-Identifier: Apache-2.0
"""A trained head of every other variant: what train's walk says of it is what a running vLLM counts."""

from pathlib import Path

import pytest

from tests.conftest import train
from tests.engine.conftest import RECIPE, Demo, beside
from tests.engine.train.references import Reference, compare, exported, observe, walked

pytestmark = pytest.mark.engine

STEPS = "120"  # enough that two drafts of three are accepted now and then
TOLERANCE = 1e-3
VARIANTS = {
    "classic": ("--variant", "eagle3"),
    "qwen3": ("--layer", "qwen3"),
    "window": ("--draft_window", "16"),
    "p-eagle": ("--parallel_drafting", "true"),
    "lk_hybrid": ("--loss", "lk_hybrid"),
}
USUAL = ("classic", "p-eagle")  # a minute each


@pytest.fixture(scope="module")
def workspace(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return beside(demo, tmp_path_factory.mktemp("variants"))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.soak) for n in VARIANTS]
)
def test_the_walk_is_what_vllm_counts(
    workspace: Path, demo: Demo, references: list[Reference], name: str
) -> None:
    own = ("--recipe", str(RECIPE), "--name", name, "--dump_of", "demo", "--max_steps", STEPS)
    done = train(workspace, *own, "--export_dtype", "float32", *VARIANTS[name])
    assert done.returncode == 0
    folder = workspace / name / "export"
    head = exported(demo.target, folder)
    observed = observe(demo.target, folder, references)
    worst, equal, compared = compare(head, references, observed)
    assert worst < TOLERANCE and equal >= 0.995 and compared > 500
    ours = walked(head, references)
    theirs = 1 + observed.num_accepted_tokens / observed.num_drafts
    assert ours.acceptance_length == pytest.approx(theirs, rel=0.02)
    assert theirs > 1.3
