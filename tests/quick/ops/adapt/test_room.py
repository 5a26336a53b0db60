# SPDX-License-Identifier: Apache-2.0
"""A chat is held out only if bench takes it."""

from pathlib import Path

import pytest

from shared.errors import UserError
from shared.prompts.rows import Prompt, parse_row
from shared.settings import build
from shared.vllm.measured_rows import WARMUP_TEXTS, check_warmup, conversation_of
from stages.bench.config import BenchConfig
from stages.bench.measure import plans
from stages.ops.adapt import room
from tests.quick.ops.adapt.conftest import write_recipe


@pytest.fixture
def config(workspace: Path) -> BenchConfig:
    path = write_recipe(workspace, {"bench": {"max_tokens": 100, "num_speculative_tokens": [3, 4]}})
    return build(BenchConfig, {"recipe": str(path), "workspace": str(workspace)})


def is_taken(config: BenchConfig, prompt: Prompt) -> bool:
    """What bench says itself."""
    try:
        found = [conversation_of(prompt)]
        check_warmup(found)
        plans.plan_of(config, config.workspace / "tiny", found)
    except UserError:
        return False
    return True


def test_what_fits_is_what_bench_takes(config: BenchConfig) -> None:
    fits = room.Room(config.model_dump(mode="json"), config.workspace).fits
    turns = [[" hello" * n] for n in (1, 200, 700, 800, 805, 810, 900, 1500)]
    turns += [["hello"] * n for n in (2, 5, 9, 12)]
    prompts = [parse_row({"turns": each}) for each in turns]
    found = [(fits(each), is_taken(config, each)) for each in prompts]
    assert {(True, True), (False, False)} <= set(found)
    assert all(ahead == taken for ahead, taken in found)


def test_a_warm_up_is_not_held_out(config: BenchConfig) -> None:
    warmup = parse_row({"prompt": WARMUP_TEXTS[0]})
    assert not is_taken(config, warmup)
    assert not room.Room(config.model_dump(mode="json"), config.workspace).fits(warmup)


def test_what_the_template_reads(config: BenchConfig) -> None:
    found = room.Room(config.model_dump(mode="json"), config.workspace).variables
    assert found is not None
    assert {"messages", "add_generation_prompt"} <= found
    assert "enable_thinking" not in found
