# SPDX-License-Identifier: Apache-2.0
"""How the demo's target learns: batches of dialogues, its optimizer and the steps, in some minutes."""

import functools
import itertools
import logging
import math
import statistics
import time
from collections.abc import Iterator

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from shared.muon import MuonAdamW
from shared.runtime.process import stop_if_requested
from shared.runtime.processor import faster_dtype
from stages.demo.config import NOTHING_KEPT
from stages.demo.dialogues import Dialogue
from stages.demo.model import END, opened

_BATCHES_A_BUCKET = 2
_IGNORED = -100
_LOG_EVERY_S = 10.0
_RECENT_STEPS = 50  # whose mean loss a line shows

Batch = tuple[torch.Tensor, torch.Tensor]  # token ids and labels, both int64 [B, T]

logger = logging.getLogger(__name__)


# Enough to answer most kinds of prompts well, all of them differently, and to be drafted for.
DEFAULT_STEPS = 200


def batches(
    tokenizer: PreTrainedTokenizerFast, stream: Iterator[Dialogue], *, rows: int
) -> Iterator[Batch]:
    """Endless batches of `rows` dialogues, one a row, padded right; labels cover the answers alone.

    With a dialogue a row the causal mask keeps them apart. Rows are sorted by length within two
    batches only: kinds differ in length, and a batch of one kind sets learning back several times.
    """
    while True:
        bucket = list(itertools.islice(stream, rows * _BATCHES_A_BUCKET))
        prompts = tokenizer([opened(dialogue) for dialogue in bucket])["input_ids"]
        answers = tokenizer([f"{dialogue.answer}{END}" for dialogue in bucket])["input_ids"]
        pairs = sorted(zip(prompts, answers, strict=True), key=lambda pair: len(pair[0] + pair[1]))
        for start in range(0, len(pairs), rows):
            group = pairs[start : start + rows]
            length = max(len(prompt + answer) for prompt, answer in group)
            ids = torch.full((len(group), length), tokenizer.pad_token_id)
            labels = torch.full((len(group), length), _IGNORED)
            for index, (prompt, answer) in enumerate(group):
                end = len(prompt + answer)
                ids[index, :end] = torch.tensor(prompt + answer)
                labels[index, len(prompt) : end] = torch.tensor(answer)
            yield ids, labels


def build_optimizer(model: LlamaForCausalLM) -> MuonAdamW:
    """Muon for the layers' matrices, AdamW for the embedding and the norms.

    After 100 steps of Muon the loss is where AdamW alone brings it after 350.
    """
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    groups = [
        {"params": inner, "muon": True, "lr": 0.01, "weight_decay": 0.05},
        {"params": outer, "muon": False, "lr": 0.008, "weight_decay": 0.0},
    ]
    return MuonAdamW(groups, dtype=faster_dtype(), betas=(0.9, 0.95), fused=True)


def _rate(step: int, *, steps: int) -> float:
    """Share of the full learning rate at `step`: a short warm-up, then a cosine down to 3 %."""
    warm_up = (step + 1) / max(1, steps // 20)
    return min(warm_up, 0.515 + 0.485 * math.cos(math.pi * min(1.0, step / steps)))


def train(model: LlamaForCausalLM, data: Iterator[Batch], *, steps: int) -> float:
    """Train `model` in place; returns the mean loss (nats an answer token) of the last tenth."""
    optimizer = build_optimizer(model)
    rate = functools.partial(_rate, steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    losses: list[float] = []
    started_s = logged_s = time.monotonic()
    seen_tokens = 0
    for step in range(1, steps + 1):
        stop_if_requested(NOTHING_KEPT)
        ids, labels = next(data)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=faster_dtype() == torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            counted = labels[:, 1:] != _IGNORED
            logits = model.lm_head(hidden[counted])  # [answer tokens, V]
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][counted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        seen_tokens += ids.numel()
        if time.monotonic() - logged_s > _LOG_EVERY_S or step in (1, steps):
            logged_s = time.monotonic()
            passed_s, recent = logged_s - started_s, losses[-_RECENT_STEPS:]
            facts = (step, steps, statistics.fmean(recent), seen_tokens / passed_s)
            left_s = passed_s / step * (steps - step)
            logger.info("step %d of %d: loss %.3f, %.0f tokens/s, %.0f s left", *facts, left_s)
    return statistics.fmean(losses[-max(1, steps // 10) :])
