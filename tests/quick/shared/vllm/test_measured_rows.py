# SPDX-License-Identifier: Apache-2.0
"""The length that a measured row needs, worked out by hand."""

from shared.vllm.measured_rows import needed_model_len


def test_needed_model_len() -> None:
    # 33 prompt tokens, 31 new ones, 3 x 3 for drafts and what asynchronous scheduling assumes.
    assert needed_model_len(33, max_tokens=31, num_speculative_tokens=3) == 73
    assert needed_model_len(33, max_tokens=31, num_speculative_tokens=0) == 64
