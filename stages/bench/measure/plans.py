# SPDX-License-Identifier: Apache-2.0
"""What an engine is told to do, and what must hold before one is started for it.

In: a config and its conversations. Out: a plan (JSON values) for each engine. Costs the
tokenisation of the prompts. The surprise: the longest row is planned, not assumed. Near
max_model_len vLLM drafts zeros and counts them, so an answer's end needs 3 K more positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.config import is_plain_url
from shared.errors import UserError
from shared.prompts.rows import Prompt
from shared.target import model as target
from shared.target.templates import for_template
from shared.target.tokenizer import load_tokenizer
from stages.bench.config import BenchConfig
from stages.bench.figures.metrics import needed_model_len
from stages.bench.measure.cells import Conversation, Message, by_category, cells

# Never measured: they only make the engine allocate and compile what it will need.
WARMUP_TEXTS = ("Hello there.", "What is the capital of a country?", "Tell me something short.")
WARMUP_TOKENS = 16  # enough for several drafts and verifications, and for a CUDA graph's first use
UNCATEGORISED = "uncategorised"
_LEAST_BATCH = 8  # so that the logit noise between batch sizes can be measured at concurrency 1
_HISTORY_ROOM = 4
_TURN_SLACK_TOKENS = 16  # a template's words around an answer that becomes history


def conversation_of(prompt: Prompt) -> Conversation:
    """The steps of a prompt: what is asked before each answer that it does not give itself.

    A row's own answers are history; its last turn is asked even where the row has the answer.
    Example: turns q1/a1, q2, q3 are two steps, (q1, a1, q2) and (q3,).
    """
    steps, said = [], list[Message]()
    for turn in prompt.turns:
        said += turn.asked
        if turn.answer is not None and turn is not prompt.turns[-1]:
            said.append(turn.answer)
            continue
        steps.append(tuple(said))
        said = []
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
    warm = {conversation.key() for conversation in warmup()}
    if found := [c.id for c in conversations if c.key() in warm]:
        raise UserError(
            f"bench.prompts: expected none of the warm-up's texts {list(WARMUP_TEXTS)}, found them "
            f"in {found[:5]}. Remove these prompts."
        )


def groups(
    conversations: list[Conversation], *, one_loop: bool
) -> list[tuple[str | None, list[Conversation]]]:
    """What is measured between two readings of the counters: all at once, or by category."""
    return [(None, conversations)] if one_loop else list(by_category(conversations).items())


def prompt_ids(
    tokenizer: Any,
    messages: Sequence[Any],
    tools: Sequence[Any],
    template_kwargs: Mapping[str, Any],
) -> list[int]:
    """A chat as the engine gets it, up to where the target speaks."""
    encoded = tokenizer.apply_chat_template(
        [for_template(message) for message in messages],
        tools=list(tools) or None,
        add_generation_prompt=True,
        return_dict=True,
        **template_kwargs,
    )
    return list(encoded["input_ids"])


def check_room(name: str, prompt_tokens: int, max_tokens: int, depth: int, limit: int) -> None:
    """Refuse a row near whose end vLLM would draft zeros and count them.

    Raises:
        UserError: with the length that it needs.
    """
    needed = needed_model_len(prompt_tokens, max_tokens=max_tokens, num_speculative_tokens=depth)
    if limit < needed:
        raise UserError(
            f"bench: expected max_model_len >= {needed} (prompt {name} of {prompt_tokens} tokens + "
            f"max_tokens {max_tokens} + 3 x {depth} drafted), found {limit}; nearer the limit vLLM "
            "drafts zeros and counts them. Raise it, lower max_tokens or drop the longest prompts."
        )


def _row_lengths(
    config: BenchConfig, folder: Path, conversations: Sequence[Conversation]
) -> tuple[int, int]:
    """(positions that the longest row needs, positions to give it).

    A row of one turn needs what it says. An answer that becomes history is tokenised anew from its
    text, and text that is no language may then take more tokens than it had: it gets room.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=config.run.trust_remote_code)
    answer, depth = max(config.max_tokens), max(config.num_speculative_tokens)
    needed, roomy = 0, 0
    for conversation in [*conversations, *warmup()]:
        asked = [message for step in conversation.steps for message in step]
        tokens = len(prompt_ids(tokenizer, asked, conversation.tools, config.run.template_kwargs))
        own = needed_model_len(tokens, max_tokens=answer, num_speculative_tokens=depth)
        history = (len(conversation.steps) - 1) * (answer + _TURN_SLACK_TOKENS)
        needed, roomy = max(needed, own + history), max(roomy, own + _HISTORY_ROOM * history)
    return needed, roomy


def check_urls(config: BenchConfig) -> None:
    """Refuse an address that the client cannot use or that must not be written down.

    Raises:
        UserError: it has no scheme, or carries credentials; they are not repeated.
    """
    for name in ("endpoint", "baseline_endpoint"):
        url = getattr(config, name)
        if url is not None and not is_plain_url(url):
            raise UserError(
                f"bench.{name}: expected http://host:port without credentials, which would stand in "
                f"the report; a key comes from $EYRIE_{name.upper()}_KEY."
            )


def plan_for_endpoint(config: BenchConfig, conversations: list[Conversation]) -> dict[str, Any]:
    """What a client of somebody else's server needs to know."""
    return {
        "cells": [asdict(cell) for cell in cells(config)],
        "conversations": [asdict(conversation) for conversation in conversations],
        "warmup": [asdict(conversation) for conversation in warmup()],
        "chat_template_kwargs": config.run.template_kwargs,
    }


def endpoint_drafters(config: BenchConfig) -> dict[str, dict[str, Any] | None]:
    """The servers of `endpoint` and `baseline_endpoint`, by their engines' names."""
    depth = config.num_speculative_tokens[0]
    drafters: dict[str, dict[str, Any] | None] = {"head": {"num_speculative_tokens": depth}}
    return {**drafters, "baseline": None} if config.baseline_endpoint else drafters


def plan_for_all(
    config: BenchConfig, folder: Path, conversations: list[Conversation]
) -> dict[str, Any]:
    """What every engine's plan shares.

    Raises:
        UserError: the target cannot hold the longest row.
    """
    needed, roomy = _row_lengths(config, folder, conversations)
    limit = int(target.read_config(folder).raw.get("max_position_embeddings") or roomy)
    if needed > limit:
        raise UserError(
            f"bench: the longest row needs {needed} positions (prompt, answers of "
            f"{max(config.max_tokens)} tokens, 3 x {max(config.num_speculative_tokens)} drafted), and "
            f"{folder} has max_position_embeddings {limit}. Lower max_tokens or "
            "num_speculative_tokens, or drop the longest prompts."
        )
    return {
        "target": str(folder),
        "trust_remote_code": config.run.trust_remote_code,
        "dtype": config.dtype,
        "tensor_parallel": config.tensor_parallel_size,
        "max_model_len": min(roomy, limit),
        "max_num_seqs": max(*config.concurrency, _LEAST_BATCH),
        "seed": config.run.seed,
        "chat_template_kwargs": config.run.template_kwargs,
        "cells": [asdict(cell) for cell in cells(config)],
        "conversations": [asdict(conversation) for conversation in conversations],
        "warmup": [asdict(conversation) for conversation in warmup()],
        "engine_args": config.engine_args,
        "references": {},
    }


def speculative_configs(config: BenchConfig, head: Path) -> dict[str, dict[str, Any] | None]:
    """The speculative_config of each engine to measure; None is the plain target.

    The heads come first, since one that the engine refuses must not cost a baseline. Names are
    `head`, `ngram` and `baseline`, with `-k5` for a draft length that is not the first.
    """
    drafters: dict[str, dict[str, Any] | None] = {}
    for depth in config.num_speculative_tokens:
        drafters[engine_name(config, "head", depth)] = {
            "method": "eagle3",
            "model": str(head),
            "num_speculative_tokens": depth,
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
    return {**drafters, "baseline": None}


def engine_name(config: BenchConfig, drafter: str, depth: int) -> str:
    """`head` for the first K, `head-k5` for another."""
    return drafter if depth == config.num_speculative_tokens[0] else f"{drafter}-k{depth}"


def depth_of(speculative: Mapping[str, Any] | None) -> int:
    """K, or 0 for the plain target."""
    return int(speculative["num_speculative_tokens"]) if speculative else 0
