# SPDX-License-Identifier: Apache-2.0
"""What the tests of adapt begin with."""

import json
from pathlib import Path

import pytest
import yaml

from stages.ops.chain import processes
from stages.ops.chain import run as chain
from stages.ops.config import AdaptConfig
from tests.heads import write_random_head
from tests.models import tiny_llama
from tests.quick.ops.chain.recipes import asked_here

RECIPE = {
    "run": {"name": "new", "target": "tiny", "max_length_tokens": 64},
    "dump": {"backend": "hf"},
    "bench": {"max_tokens": 16},
}


@pytest.fixture(autouse=True)
def no_stage_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not refused as it should be must not start an engine."""
    monkeypatch.setattr(chain, "run", lambda _: pytest.fail("a stage would have started"))


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are asked here, and train takes any head; tests/stages/ops asks them as adapt does."""
    monkeypatch.setattr(processes, "steps", asked_here)
    monkeypatch.setattr(processes, "refused_heads", lambda *_: [])


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A target, a head of it, a server's log of sixty chats, and a recipe."""
    target = tiny_llama(tmp_path / "tiny")
    write_random_head(tmp_path / "head", target=target, draft_vocab_size=128)
    grow(tmp_path, 0, 60)
    write_recipe(tmp_path, {})
    return tmp_path


def grow(workspace: Path, first: int, last: int) -> None:
    """Chats that the server is asked."""
    with (workspace / "server.log").open("a") as log:
        for n in range(first, last):
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": f"q{n}"}]})
            log.write(f"DEBUG Request chatcmpl-{n} JSON body: {body}\n")


def write_recipe(
    workspace: Path, changes: dict[str, dict[str, object]], path: str = "recipe.yaml"
) -> Path:
    """The recipe with these settings on top."""
    recipe = {name: {**RECIPE.get(name, {}), **changes.get(name, {})} for name in RECIPE | changes}
    (workspace / path).parent.mkdir(exist_ok=True, parents=True)
    (workspace / path).write_text("# mine\n" + yaml.safe_dump(recipe))
    return workspace / path


def asked(workspace: Path, **flags: object) -> AdaptConfig:
    """The command on the fixture's recipe."""
    needed = {"recipe": workspace / "recipe.yaml", "head": "head", "traffic": "server.log"}
    return AdaptConfig.model_validate({"workspace": workspace, **needed, **flags})
