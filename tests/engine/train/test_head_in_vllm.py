# SPDX-License-Identifier: Apache-2.0
"""The demo's exported head inside vLLM's own Eagle3 model, in float32, against ours."""

import json
import shutil
from pathlib import Path

import pytest

from stages.train.model import DraftHead
from tests.engine.conftest import Demo
from tests.engine.train.proposer import Observation
from tests.engine.train.references import (
    SCORED_TOKENS,
    Reference,
    compare,
    exported,
    observe,
    walked,
)

pytestmark = pytest.mark.engine

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def head(demo: Demo) -> DraftHead:
    return exported(demo.target, demo.export)


@pytest.fixture(scope="module")
def observed(demo: Demo, references: list[Reference]) -> Observation:
    return observe(demo.target, demo.export, references)


def test_the_engine_gives_the_references_tokens(
    references: list[Reference], observed: Observation
) -> None:
    for reference, trace in zip(references, observed.traces, strict=True):
        start = len(reference.prompt)
        expected = reference.tokens[start : start + SCORED_TOKENS].tolist()
        assert trace.output_token_ids == expected


def test_our_logits_are_vllms(
    head: DraftHead, references: list[Reference], observed: Observation
) -> None:
    worst, equal, compared = compare(head, references, observed)
    assert compared > 500
    assert worst < TOLERANCE
    assert equal >= 0.995


def test_the_walk_is_what_vllm_counts(
    head: DraftHead, references: list[Reference], observed: Observation
) -> None:
    ours = walked(head, references)
    theirs = 1 + observed.num_accepted_tokens / observed.num_drafts
    assert ours.acceptance_length == pytest.approx(theirs, rel=0.02)
    assert observed.num_drafts > 300


def test_aux_ids_one_off_are_caught(
    demo: Demo, head: DraftHead, references: list[Reference], tmp_path: Path
) -> None:
    shifted = tmp_path / "shifted"
    shutil.copytree(demo.export, shifted)
    config = json.loads((shifted / "config.json").read_text())
    ids = config["eagle_aux_hidden_state_layer_ids"]
    config["eagle_aux_hidden_state_layer_ids"] = [layer + 1 for layer in ids]
    (shifted / "config.json").write_text(json.dumps(config))
    worst, equal, _ = compare(head, references, observe(demo.target, shifted, references))
    assert worst > 100 * TOLERANCE
    assert equal < 0.995
