# SPDX-License-Identifier: Apache-2.0
"""What an engine is asked to do, and what must hold before one is started for it.

In: a config and its conversations. Out: the plan that all engines share, and how each one drafts. Costs
the tokenisation of the prompts. Near max_model_len vLLM drafts zeros and counts them, so the longest
row is computed and its end gets 3 K more positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.conversations.template import ChatTemplate
from shared.errors import UserError
from shared.prompts.rows import Prompt
from shared.target import model as target
from shared.target.tokenizer import load_chat_tokenizer
from shared.vllm.measured_rows import TURN_SLACK_TOKENS, WARMUP_TEXTS, needed_model_len
from stages.bench.config import BenchConfig
from stages.bench.measure.loads import Conversation, Load, Message, loads_of

WARMUP_TOKENS = 16  # enough for several drafts and verifications, and for a CUDA graph's first use
UNCATEGORISED = "uncategorised"
_MIN_BATCH = 8  # so that the logit noise between batch sizes can be measured at concurrency 1
_HISTORY_ROOM = 4

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


def conversation_of(prompt: Prompt) -> Conversation:
    """The steps of a prompt: the messages before each answer that the prompt does not give itself.

    A row's own answers are history; its last turn is asked even where the row has the answer.
    Example: turns q1/a1, q2, q3 are two steps, (q1, a1, q2) and (q3,).
    """
    steps, messages = [], list[Message]()
    for turn in prompt.turns:
        messages += turn.asked
        if turn.answer is not None and turn is not prompt.turns[-1]:
            messages.append(turn.answer)
            continue
        steps.append(tuple(messages))
        messages = []
    category = prompt.category or UNCATEGORISED
    return Conversation(prompt.sample_id, category, tuple(steps), prompt.tools)


def warmup() -> list[Conversation]:
    """Conversations that no measurement holds."""
    return [
        Conversation(f"warmup-{n}", "", (({"role": "user", "content": text},),))
        for n, text in enumerate(WARMUP_TEXTS)
    ]


def check_warmup(conversations: Sequence[Conversation]) -> None:
    """Refuse to measure what the warm-up has already run.

    Raises:
        UserError: a measured conversation begins as a warm-up does.
    """
    warm = [conversation.steps[0] for conversation in warmup()]
    if found := [c.id for c in conversations if c.steps[0] in warm]:
        raise UserError(
            f"bench.prompts: expected none of the warm-up's texts {list(WARMUP_TEXTS)}, found them "
            f"in {found[:5]}.",
            code="prompt-is-warmup",
            remedy="Remove these prompts.",
            facts={"prompts": found[:20]},
        )


def groups(
    conversations: list[Conversation], *, one_loop: bool
) -> list[tuple[str | None, list[Conversation]]]:
    """What is measured between two readings of the counters: all at once, or by category."""
    found: dict[str | None, list[Conversation]] = {}
    for conversation in conversations:
        found.setdefault(None if one_loop else conversation.category, []).append(conversation)
    return list(found.items())


def check_room(name: str, prompt_tokens: int, max_tokens: int, depth: int, limit: int) -> None:
    """Refuse a row near whose end vLLM would draft zeros and count them.

    Raises:
        UserError: with the length that it needs.
    """
    needed = needed_model_len(prompt_tokens, max_tokens=max_tokens, num_speculative_tokens=depth)
    if limit < needed:
        raise UserError(
            f"bench: prompt {name} of {prompt_tokens} tokens needs {needed} positions (max_tokens "
            f"{max_tokens} and 3 x {depth} drafted tokens with it), and the engine has {limit}; "
            "nearer its limit vLLM drafts zeros and counts them.",
            code="row-too-long",
            remedy="Raise max_model_len, lower max_tokens or num_speculative_tokens, or drop the "
            "longest prompts.",
            facts={"prompt": name, "needed": needed, "limit": limit},
        )


def _longest_row(
    config: BenchConfig, folder: Path, conversations: Sequence[Conversation], limit: int | None
) -> int:
    """The positions to give to every row: the longest one's, or the target's limit.

    A row of one turn needs its own length. An answer that becomes history is tokenised anew from its
    text, and text that is no language may then take more tokens than it had: it gets room.

    Raises:
        UserError: the target cannot hold a row; it is named.
    """
    tokenizer = load_chat_tokenizer(folder, config.run, config.workspace)
    template = ChatTemplate(tokenizer, config.run.template_kwargs)
    answer, depth = max(config.max_tokens), max(config.num_speculative_tokens)
    longest = 0
    for conversation in [*conversations, *warmup()]:
        asked = [message for step in conversation.steps for message in step]
        tokens = len(template.prompt_ids(asked, conversation.tools))
        history = (len(conversation.steps) - 1) * (answer + TURN_SLACK_TOKENS)
        if limit is not None:
            check_room(conversation.id, tokens + history, answer, depth, limit)
        own = needed_model_len(tokens, max_tokens=answer, num_speculative_tokens=depth)
        longest = max(longest, own + _HISTORY_ROOM * history)
    return longest if limit is None else min(longest, limit)


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
    longest = _longest_row(config, folder, conversations, int(limit) if limit else None)
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
            **config.speculative_options,
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
