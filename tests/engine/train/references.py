# SPDX-License-Identifier: Apache-2.0
"""Greedy answers and their hidden states by transformers alone, and a head's drafts along them.

Neither vLLM's capture nor its proposer's inputs are taken on trust: a head served with its aux ids one
off gets other states than it was trained on, and its logits show it.

K draft length, V target vocabulary, A aux layers, H hidden size.
"""

import dataclasses
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.target import model as targets
from shared.target.tensors import read_tensors
from stages.bench.head_check import needed_settings
from stages.train.model import DraftHead
from stages.train.objective.walk import Walk, combine, walk
from tests.engine.train.proposer import Observation, observe_in_child
from tests.heads import draft_logits, load_head

K = 3
SCORED_TOKENS = 64
NUM_PROMPTS = 24


@dataclasses.dataclass(frozen=True)
class Reference:
    """One prompt's greedy answer, K + 1 tokens longer than scored, and the states over it."""

    prompt: list[int]
    tokens: torch.Tensor  # [T + 1] int64
    states: dict[int, torch.Tensor]  # layer id -> [T, H] float32


def make_references(target: Path) -> list[Reference]:
    """All of it from transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    lines = (target / "held_out.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    found = []
    for line in lines:
        messages = [{"role": "user", "content": json.loads(line)["prompt"]}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = encoded["input_ids"]
        with torch.no_grad():
            for _ in range(SCORED_TOKENS + K + 1):  # the demo's rows are short: no cache needed
                best = model(ids).logits[:, -1:].argmax(-1)
                ids = torch.cat((ids, best), dim=1)
            states = model(ids, output_hidden_states=True).hidden_states
        prompt = encoded["input_ids"][0].tolist()
        found.append(Reference(prompt, ids[0], {i: s[0] for i, s in enumerate(states)}))
    return found


def observe(target: Path, head: Path, references: list[Reference]) -> Observation:
    """What vLLM drafts with an exported head for the references' prompts."""
    return observe_in_child(
        target,
        head=head,
        num_speculative_tokens=K,
        prompts=[reference.prompt for reference in references],
        max_tokens=SCORED_TOKENS,
        speculative=needed_settings(head),
    )


def exported(target: Path, folder: Path) -> DraftHead:
    """An exported head as ours, in float32."""
    tensors = read_tensors(targets.read_config(target))
    return load_head(folder, tensors.embed_tokens.float()).float().eval()


@torch.no_grad()
def our_logits(head: DraftHead, reference: Reference) -> torch.Tensor:
    """[K, T, D] for every slot, teacher forced on the reference answer."""
    states = torch.cat([reference.states[layer] for layer in head.config.aux_layers], dim=-1)
    return draft_logits(head, reference.tokens, states, num_steps=K)


def compare(
    head: DraftHead, references: list[Reference], observation: Observation
) -> tuple[float, float, int]:
    """(largest difference of a logit, share of equal drafted ids, ids compared).

    Step k of a chain is compared where the chain was fed the answer's own tokens up to there: only
    then do both sides see the same input.
    """
    worst, equal, compared = 0.0, 0, 0
    rows = head.to_target_ids(torch.arange(head.config.draft_vocab_size))
    for reference, trace in zip(references, observation.traces, strict=True):
        ours = our_logits(head, reference)
        for event in trace.events:
            slot = event.position
            for step in range(K):
                fed = reference.tokens[slot + 2 : slot + 2 + step].tolist()
                if event.drafted[:step] != fed:
                    break
                mine = ours[step, slot]
                worst = max(worst, float((event.logits[step, rows] - mine).abs().max()))
                equal += int(rows[mine.argmax()]) == event.drafted[step]
                compared += 1
    return worst, equal / compared, compared


def walked(head: DraftHead, references: list[Reference]) -> Walk:
    walks = []
    for reference in references:
        proposed = head.to_target_ids(our_logits(head, reference).argmax(-1))  # [K, T]
        last = len(reference.tokens) - 1 - K  # slots whose K proposals are all known
        hits = torch.stack(
            [proposed[k, :last] == reference.tokens[2 + k : 2 + k + last] for k in range(K)], dim=1
        )
        first = len(reference.prompt) - 1
        walks.append(walk(hits, first_slot=first, num_scored_tokens=SCORED_TOKENS))
    return combine(walks, K)
