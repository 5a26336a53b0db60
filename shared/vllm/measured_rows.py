# SPDX-License-Identifier: Apache-2.0
"""Rows on which bench can measure a drafter: bench refuses the others, preflight and adapt ask ahead."""

# Never measured: they only make the engine allocate and compile what it will need.
WARMUP_TEXTS = ("Hello there.", "What is the capital of a country?", "Tell me something short.")
TURN_SLACK_TOKENS = 16  # a template's words around an answer that becomes history


def needed_model_len(prompt_tokens: int, *, max_tokens: int, num_speculative_tokens: int) -> int:
    """The max_model_len below which vLLM no longer drafts in earnest towards an answer's end.

        prompt + max_tokens + 3 K

    The drafter runs while `tokens + K drafts + K <= max_model_len`, otherwise the step's draft is K
    times token 0 and is counted all the same. Asynchronous scheduling assumes that the drafts in
    flight, K more, are accepted.
    """
    return prompt_tokens + max_tokens + 3 * num_speculative_tokens
