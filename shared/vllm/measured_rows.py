# SPDX-License-Identifier: Apache-2.0
"""Rows on which bench can measure a drafter: bench refuses the others, preflight and adapt ask ahead.

A conversation is a list of steps: the messages to add before the target speaks again. An MT-Bench question is
two steps of one message.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import UserError
from shared.prompts.rows import Message, Prompt

# Never measured: they only make the engine allocate and compile what it will need.
WARMUP_TEXTS = ("Hello there.", "What is the capital of a country?", "Tell me something short.")
TURN_SLACK_TOKENS = 16  # a template's words around an answer that becomes history
UNCATEGORISED = "uncategorised"
_HISTORY_ROOM = 4

# Messages and tools -> the token ids of the prompt.
PromptIds = Callable[[Sequence[Message], Sequence[Any]], Sequence[int]]


@dataclass(frozen=True)
class Conversation:
    """One prompt, or several that build on each other's answers."""

    id: str
    category: str
    steps: tuple[tuple[Message, ...], ...]
    tools: tuple[dict[str, Any], ...] = ()


def needed_model_len(prompt_tokens: int, *, max_tokens: int, num_speculative_tokens: int) -> int:
    """The max_model_len below which vLLM no longer drafts in earnest towards an answer's end.

        prompt + max_tokens + 3 K

    The drafter runs while `tokens + K drafts + K <= max_model_len`, otherwise the step's draft is K
    times token 0 and is counted all the same. Asynchronous scheduling assumes that the drafts in
    flight, K more, are accepted.
    """
    return prompt_tokens + max_tokens + 3 * num_speculative_tokens


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
            remedy="Lower bench.max_tokens or num_speculative_tokens, drop the longest prompts, or give a "
            "server of your own a larger max_model_len.",
            facts={"prompt": name, "needed": needed, "limit": limit},
        )


def longest_row(
    conversations: Iterable[Conversation],
    prompt_ids: PromptIds,
    *,
    max_tokens: int,
    num_speculative_tokens: int,
    limit: int | None,
) -> int:
    """The positions to give to every row: the longest one's, or the target's limit.

    A row of one turn needs its own length. An answer that becomes history is tokenised anew from its
    text, and text that is no language may then take more tokens than it had: it gets room.

    Args:
        limit: the target's positions; None where they are not known.

    Raises:
        UserError: the target cannot hold a row; it is named.
    """
    longest = 0
    for conversation in conversations:
        asked = [message for step in conversation.steps for message in step]
        tokens = len(prompt_ids(asked, conversation.tools))
        history = (len(conversation.steps) - 1) * (max_tokens + TURN_SLACK_TOKENS)
        if limit is not None:
            check_room(conversation.id, tokens + history, max_tokens, num_speculative_tokens, limit)
        own = needed_model_len(
            tokens, max_tokens=max_tokens, num_speculative_tokens=num_speculative_tokens
        )
        longest = max(longest, own + _HISTORY_ROOM * history)
    return longest if limit is None else min(longest, limit)
