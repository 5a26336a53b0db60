# SPDX-License-Identifier: Apache-2.0
"""What an engine is asked to do, and what must hold before one is started for it.

In: a config and its conversations. Out: the plan that all engines share, and how each one drafts. Costs
the tokenisation of the prompts. Near max_model_len vLLM drafts zeros and counts them, so the longest
row is computed and its end gets 3 K more positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.conversations.template import ChatTemplate
from shared.target import model as target
from shared.target.tokenizer import load_chat_tokenizer
from shared.vllm.measured_rows import Conversation, longest_row, warmup
from stages.bench.config import BenchConfig
from stages.bench.measure.loads import Load, loads_of

WARMUP_TOKENS = 16  # enough for several drafts and verifications, and for a CUDA graph's first use
_MIN_BATCH = 8  # so that the logit noise between batch sizes can be measured at concurrency 1

Speculative = dict[str, Any] | None  # vLLM's speculative_config; None is the plain target


@dataclass(frozen=True)
class Plan:
    """What every engine of a measurement is asked to do."""

    config: BenchConfig
    conversations: list[Conversation]
    loads: list[Load]
    target: Path | None = None  # None for an existing endpoint, as the sizes below
    max_model_len: int = 0
    max_num_seqs: int = 0


def groups(
    conversations: list[Conversation], *, one_loop: bool
) -> list[tuple[str | None, list[Conversation]]]:
    """What is measured between two readings of the counters: all at once, or by category."""
    found: dict[str | None, list[Conversation]] = {}
    for conversation in conversations:
        found.setdefault(None if one_loop else conversation.category, []).append(conversation)
    return list(found.items())


def plan_of(config: BenchConfig, folder: Path | None, conversations: list[Conversation]) -> Plan:
    """What all engines share.

    Args:
        folder: the target's; None where existing servers are measured.

    Raises:
        UserError: the target cannot hold the longest row.
    """
    loads = loads_of(config)
    if folder is None:
        return Plan(config, conversations, loads)
    limit = target.read_config(folder).raw.get("max_position_embeddings")
    tokenizer = load_chat_tokenizer(folder, config.run, config.workspace)
    longest = longest_row(
        [*conversations, *warmup()],
        ChatTemplate(tokenizer, config.run.template_kwargs).prompt_ids,
        max_tokens=max(config.max_tokens),
        num_speculative_tokens=max(config.num_speculative_tokens),
        limit=int(limit) if limit else None,
    )
    return Plan(
        config,
        conversations,
        loads,
        target=folder,
        max_model_len=longest,
        max_num_seqs=max(*config.concurrency, _MIN_BATCH),
    )


def drafters_of(
    config: BenchConfig, head: Path | None, own: Mapping[str, Any] | None = None
) -> dict[str, Speculative]:
    """How each engine drafts, by the engine's name.

    The heads come first, since one that the engine refuses must not cost a baseline. Names are
    `head`, `ngram` and `baseline`, with `-k5` for a draft length that is not the first.

    Args:
        head: the head's folder; None where existing servers are measured.
        own: what vLLM must be told of this head beside its folder.
    """
    if head is None:
        depth = config.num_speculative_tokens[0]
        known: dict[str, Speculative] = {"head": {"num_speculative_tokens": depth}}
        return {**known, "baseline": None} if config.baseline_endpoint else known
    drafters: dict[str, Speculative] = {}
    for depth in config.num_speculative_tokens:
        drafters[engine_name(config, "head", depth)] = {
            "method": "eagle3",
            "model": str(head),
            "num_speculative_tokens": depth,
            **(own or {}),
            **config.speculative_args,
        }
    if config.compare_ngram:
        for depth in config.num_speculative_tokens:
            drafters[engine_name(config, "ngram", depth)] = {
                "method": "ngram",
                "num_speculative_tokens": depth,
                # The strongest setting on structured answers, in tokens per target step.
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 1,
            }
    return {**drafters, "baseline": None} if config.compare_baseline else drafters


def engine_name(config: BenchConfig, drafter: str, depth: int) -> str:
    """`head` for the first K, `head-k5` for another."""
    return drafter if depth == config.num_speculative_tokens[0] else f"{drafter}-k{depth}"


def depth_of(speculative: Speculative) -> int:
    """K, or 0 for the plain target."""
    return int(speculative["num_speculative_tokens"]) if speculative else 0
