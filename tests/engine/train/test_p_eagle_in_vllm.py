# SPDX-License-Identifier: Apache-2.0
"""A P-EAGLE head in a running engine: one forward pass drafts what our walk says, and its logits are ours.

The head is random, so drafts are accepted at rates that vLLM is told: batches with and without
rejected rows are both seen.
"""

from pathlib import Path

import pytest
import torch

from shared.contracts.head_variant import HeadVariant, named_variant
from stages.bench.head_check import needed_settings
from stages.train.export.hf import export_head
from tests.engine.train.proposer import observe_in_child
from tests.engine.train.test_variants_in_vllm import random_head
from tests.heads import draft_logits
from tests.models import tiny_llama
from tests.runs import ROOT

pytestmark = pytest.mark.engine

K = 3
SYNTHETIC = ROOT / "tests" / "engine" / "synthetic"
TOLERANCE = 1e-3


@pytest.mark.parametrize(
    "variant",
    [named_variant("eagle3.1", parallel=True), named_variant("eagle3", "qwen3", 16, parallel=True)],
    ids=["norms", "qwen3-window"],
)
def test_one_pass_drafts_what_our_walk_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: HeadVariant
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SYNTHETIC))
    target = tiny_llama(tmp_path / "tiny", max_length_tokens=256)
    head = random_head(target, variant)
    export_head(head, tmp_path / "head", target="tiny", provenance={}, dtype="float32")
    torch.manual_seed(0)
    observed = observe_in_child(
        target,
        head=tmp_path / "head",
        num_speculative_tokens=K,
        prompts=[torch.randint(0, 500, (length,)).tolist() for length in (1, 7, 40)],
        max_tokens=48,
        max_model_len=256,
        speculative={
            **needed_settings(tmp_path / "head"),
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [0.7, 0.5, 0.4],
        },
        engine_args={"skip_tokenizer_init": True},
    )
    rows, worst, equal = head.token_ids(), 0.0, []
    for trace in observed.traces:
        with torch.no_grad():
            ours = draft_logits(head, trace.tokens, trace.aux_states, num_steps=K)  # [K, T, D]
        for event in trace.events:
            mine = ours[:, event.position]
            worst = max(worst, float((event.logits[:, rows] - mine).abs().max()))
            equal += (rows[mine.argmax(-1)] == torch.tensor(event.drafted)).tolist()
            assert len(event.positions) == 1, "more than one forward pass"
    accepted = {event.accepted for trace in observed.traces for event in trace.events}
    assert accepted >= {0, 1, 2, 3}
    assert worst < TOLERANCE
    assert sum(equal) >= 0.995 * len(equal)
    assert len(equal) > 150
