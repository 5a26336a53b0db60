# SPDX-License-Identifier: Apache-2.0
"""What decides between the old head and the new one: a gain that the chats bear out."""

import json
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.paths import RunPaths
from stages.ops.adapt.gain import compare, told
from tests.quick.ops.adapt.benches import write_bench

# Eight chats, of which some are much easier than others.
OLD = (1.2, 1.5, 1.7, 1.9, 2.1, 2.3, 2.5, 2.8)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunPaths, RunPaths]:
    return RunPaths(tmp_path, "old"), RunPaths(tmp_path, "new")


@pytest.mark.parametrize(("gain", "improved"), [(0.03, True), (0.01, False), (-0.05, False)])
def test_a_gain_of_less_than_was_asked_for_is_none(
    runs: tuple[RunPaths, RunPaths], gain: float, improved: bool
) -> None:
    old, new = runs
    write_bench(old, [2.0] * 8)
    write_bench(new, [2.0 * (1 + gain)] * 8, tokens_per_s=110)
    found = compare(old, new, 0.02)
    assert found["improved"] is improved
    assert (found["before"], found["after"]) == pytest.approx((2.0, 2 + 2 * gain))
    assert found["gain"] == pytest.approx(gain)
    assert found["gain_interval"] == pytest.approx([gain, gain])
    assert found["after_tokens_per_s"] == pytest.approx(110)


def test_a_gain_that_is_one_chats_luck_is_none(runs: tuple[RunPaths, RunPaths]) -> None:
    old, new = runs
    write_bench(old, OLD)
    write_bench(new, (*(length - 0.05 for length in OLD[:-1]), 3.7))
    found = compare(old, new, 0.02)
    assert found["gain"] > 0.03
    low, high = found["gain_interval"]
    assert low < 0 < high
    assert found["improved"] is False
    assert told(found).startswith(f"acceptance_length=2.00->2.07 gain=+3.4% interval={low:+.1%}..")


def test_a_small_gain_of_every_chat_is_one_though_the_chats_differ_by_more(
    runs: tuple[RunPaths, RunPaths],
) -> None:
    old, new = runs
    write_bench(old, OLD)
    write_bench(new, [1.05 * length for length in OLD])
    found = compare(old, new, 0.02)
    assert found["before_interval"][1] > found["after_interval"][0]  # each by itself says nothing
    assert found["improved"] is True


def test_tokens_a_second_that_fell_are_told(
    runs: tuple[RunPaths, RunPaths], caplog: pytest.LogCaptureFixture
) -> None:
    old, new = runs
    write_bench(old, OLD)
    write_bench(new, [1.1 * length for length in OLD], tokens_per_s=60)
    found = compare(old, new, 0.02)
    assert found["improved"] is True
    assert found["speed_change_interval"] == pytest.approx([0.6, 0.6])
    assert "the new head is slower: tokens/s 100.0 before, 60.0 after, 0.60 times" in caplog.text
    caplog.clear()
    write_bench(new, [1.1 * length for length in OLD], tokens_per_s=101)
    compare(old, new, 0.02)
    assert caplog.text == ""


def test_without_counts_by_request_the_gain_alone_decides_and_that_is_told(
    runs: tuple[RunPaths, RunPaths], caplog: pytest.LogCaptureFixture
) -> None:
    old, new = runs
    write_bench(old, OLD, is_counted=False)
    write_bench(new, [1.1 * length for length in OLD], is_counted=False)
    found = compare(old, new, 0.02)
    assert (found["gain_interval"], found["improved"]) == (None, True)
    assert "A gain by luck is not told from a real one" in caplog.text
    assert "interval=unknown" in told(found)


def test_answers_that_are_gone_or_damaged_are_refused(runs: tuple[RunPaths, RunPaths]) -> None:
    old, new = runs
    for paths in runs:
        write_bench(paths, OLD)
    raw = new.stage("bench") / "raw" / "head.json"
    measured = json.loads(raw.read_text())
    measured["loads"][0]["segments"][0]["requests"][2]["latency_s"] = 0
    raw.write_text(json.dumps(measured))
    with pytest.raises(
        UserError, match=r"head\.json: loads\.0\.segments\.0\.requests\.2\.latency_s"
    ):
        compare(old, new, 0.02)
    raw.unlink()
    with pytest.raises(UserError, match=r"head\.json"):
        compare(old, new, 0.02)
