# SPDX-License-Identifier: Apache-2.0
"""vLLM's `/metrics` text: our reading of it against one by other code."""

import pytest

from stages.bench.figures.metrics import Counters, acceptance, delta
from stages.bench.measure.exposition import parse
from tests import recompute

TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="target"} 1.0
vllm:num_requests_running{engine="1",model_name="target"} 0.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="target"} 2.0
# TYPE vllm:request_success counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="target"} 3.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="target"} 4.0
# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="target"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="target"} 5.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="target"} 1.7e9
# TYPE vllm:spec_decode_num_draft_tokens counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="target"} 45.0
# TYPE vllm:spec_decode_num_accepted_tokens counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="target"} 20.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="0"} 10.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="2"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="target",position="1"} 7.0
"""


def test_all_ranks_are_summed_and_positions_are_in_order() -> None:
    reading = parse(TEXT)
    assert reading.counters == Counters(15, 45, 20, (10, 7, 3))
    assert (reading.unfinished, reading.answered) == (3, 7)


def test_the_same_figures_as_the_independent_script() -> None:
    before = TEXT.replace("} 10.0", "} 1.0").replace("} 45.0", "} 18.0").replace("} 20.0", "} 8.0")
    before = before.replace('position="1"} 7.0', 'position="1"} 4.0')
    counters = [parse(text).counters for text in (before, TEXT)]
    assert counters[0] is not None
    assert counters[1] is not None
    theirs = recompute.figures(before, TEXT)
    # drafts 15 - 6, accepted 20 - 8, by position 9, 3 and 0
    ours = acceptance(delta(*counters), num_speculative_tokens=3, always_drafts=True)  # type: ignore[arg-type]
    assert theirs["acceptance_length"] == pytest.approx(1 + 12 / 9) == ours.acceptance_length
    assert theirs["acceptance_rate"] == pytest.approx(12 / 27) == ours.acceptance_rate
    assert theirs["per_position"] == [1.0, 3 / 9, 0.0] == list(ours.per_position)


def test_a_server_that_does_not_draft() -> None:
    plain = "\n".join(line for line in TEXT.splitlines() if "spec_decode" not in line) + "\n"
    assert parse(plain).counters is None


@pytest.mark.parametrize("text", ["", "<html></html>", "up 1\n"])
def test_another_text_is_no_reading(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse(text)
