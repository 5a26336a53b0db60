# SPDX-License-Identifier: Apache-2.0
"""The prompts that bench would measure, and whether the target has room for them: by bench's own rules."""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

from shared.config import RunConfig
from shared.conversations.template import ChatTemplate, TemplateMismatch
from shared.errors import UserError
from shared.paths import find_input
from shared.prompts import sources
from shared.prompts.sources import Source
from shared.runtime.status import Accounting
from shared.target.model import TargetConfig
from shared.target.tokenizer import load_chat_tokenizer
from shared.vllm.measured_rows import (
    Conversation,
    conversation_of,
    longest_row,
    needed_model_len,
)
from stages.ops.chain.asked import most_tokens
from stages.ops.chain.processes import SOURCE_ROOT, Step
from stages.ops.chain.served import problem, said

LABEL = "bench.prompts"
# So many prompts are looked at: bench measures hundreds.
_MAX_PROMPTS = 2_000


def prompts_of(bench: Step, workspace: Path) -> Source | None:
    """Files with bench's prompts, its own where the recipe has none; None for those on a hub."""
    given = bench.settings["prompts"]
    source = Source.model_validate(
        given or {"path": str(SOURCE_ROOT / "stages" / "bench" / "prompts.jsonl")}
    )
    return None if sources.is_on_hub(source, workspace) else source


def conversations_of(bench: Step, workspace: Path) -> list[Conversation]:
    """What bench would measure; nothing where its prompts cannot be read, which preflight tells."""
    source, wanted = prompts_of(bench, workspace), bench.settings["max_prompts"] or _MAX_PROMPTS
    if source is None:
        return []
    try:
        rows = sources.without_duplicates(sources.file_rows(source, workspace, LABEL))
        usable = sources.usable(rows, Accounting())
        return [conversation_of(row) for row in itertools.islice(usable, min(wanted, _MAX_PROMPTS))]
    except UserError:
        return []


def room_problems(bench: Step, config: TargetConfig, workspace: Path) -> Iterator[str]:
    """Why a prompt has no room in the target, or not even one of one token: bench's own rule."""
    positions = config.raw.get("max_position_embeddings")
    if bench.settings["endpoint"] or not isinstance(positions, int):
        return
    answer, depth = (max(bench.settings[key]) for key in ("max_tokens", "num_speculative_tokens"))
    needed = needed_model_len(1, max_tokens=answer, num_speculative_tokens=depth)
    if needed > positions:
        yield problem(
            "bench.max_tokens and num_speculative_tokens",
            f"room for a prompt, {answer} tokens and 3 x {depth} drafted ones in the target's "
            f"{positions} positions",
            f"at least {needed}",
            "Lower max_tokens or num_speculative_tokens.",
        )
        return
    yield from said(lambda: _require_room(bench, workspace, answer, depth, positions))


def _require_room(bench: Step, workspace: Path, answer: int, depth: int, positions: int) -> None:
    """Refuse a prompt that the target has no room for; nothing where its tokenizer cannot be asked."""
    measure = functools.partial(
        longest_row,
        conversations_of(bench, workspace),
        max_tokens=answer,
        num_speculative_tokens=depth,
        limit=positions,
    )
    with contextlib.suppress(UserError):
        measure(most_tokens)  # the tokenizer takes seconds to load
        return
    if (folder := find_input(bench.target, workspace)) is None:
        return
    run = RunConfig.model_validate(bench.run)
    try:
        tokenizer = load_chat_tokenizer(folder, run, workspace)
    except (UserError, ModuleNotFoundError):  # the ops image has no transformers
        return
    with contextlib.suppress(TemplateMismatch):
        measure(ChatTemplate(tokenizer, run.template_kwargs).prompt_ids)
