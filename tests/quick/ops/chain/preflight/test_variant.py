# SPDX-License-Identifier: Apache-2.0
"""A head that bench's older vLLM would serve as another one is named before the first stage."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stages.ops.chain.preflight import packages
from tests.heads import write_random_head
from tests.quick.ops.chain.recipes import problems, steps

CLASSIC = {"variant": "eagle3"}
NORMS = {"fc_norm": True, "norm_output": True}
WINDOW = {"layer_types": ["sliding_attention"], "sliding_window": 64}
ONLY_BENCH = slice(3, 4)


@pytest.fixture(autouse=True)
def older_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    found = packages.installed
    monkeypatch.setattr(packages, "installed", lambda p: {**found(p), "vllm": "0.31.1+cpu"})


def head_in(folder: Path, workspace: Path, **changes: Any) -> None:
    """A random head with these keys in its config."""
    write_random_head(folder, target=workspace / "model", draft_vocab_size=128)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def told(workspace: Path, changes: dict[str, Any], chosen: slice = slice(None)) -> list[str]:
    found = problems(steps(workspace, changes)[chosen], workspace)
    return [line for line in found if "bench's vLLM serves" in line]


@pytest.mark.parametrize(
    ("train", "found"),
    [
        (
            {},
            "train.variant: expected a head that bench's vLLM serves; EAGLE-3.1 needs vLLM >=0.32",
        ),
        (CLASSIC | {"draft_window": 64}, "train.draft_window: .*; a head with a window needs vLLM"),
        ({"parallel_drafting": True, "draft_window": 64}, "train.draft_window: "),
        ({"parallel_drafting": True, "variant": "eagle3.1"}, "train.variant: .*P-EAGLE needs vLLM"),
        (CLASSIC, None),
        (CLASSIC | {"layer": "qwen3"}, None),
        ({"parallel_drafting": True}, None),
    ],
)
def test_a_head_to_be_trained(workspace: Path, train: dict[str, Any], found: str | None) -> None:
    lines = told(workspace, {"train": train})
    assert len(lines) == bool(found)
    assert not found or re.match(found, lines[0])
    assert all("found vLLM 0.31.1+cpu. Give bench a newer" in line for line in lines)


@pytest.mark.parametrize(("changes", "count"), [(NORMS, 1), (WINDOW, 1), ({}, 0)])
def test_a_head_that_is_there(workspace: Path, changes: dict[str, Any], count: int) -> None:
    head_in(workspace / "head", workspace, **changes)
    warm, other = {"train": {"init_from": "head"}}, {"bench": {"head": "head"}}
    for label, chosen in (("train.init_from", warm), ("bench.head", other)):
        lines = told(workspace, chosen)
        assert [line.partition(":")[0] for line in lines] == [label] * count
    # Trained already, by a recipe that may have changed since.
    export = workspace / "run" / "export"
    head_in(export, workspace, **changes)
    (export / "manifest.json").write_text("{}")
    for chosen in (slice(None), ONLY_BENCH):
        lines = told(workspace, {"train": {"variant": "eagle3" if count else "eagle3.1"}}, chosen)
        assert [line.partition(":")[0] for line in lines] == [str(export)] * count


def test_a_vllm_that_does_not_serve_the_new_head_may_be_older(workspace: Path) -> None:
    for other in ({"endpoint": "http://127.0.0.1:9"}, {"head": "org/head"}, {"head": "model"}):
        assert told(workspace, {"bench": other}) == []
    assert told(workspace, {"train": {"init_from": "org/head"}}) == []
    assert told(workspace, {}, slice(0, 3)) == []
