# SPDX-License-Identifier: Apache-2.0
"""Gates, against a limit or an earlier report: met, missed, and impossible to judge."""

from pathlib import Path
from typing import Any

import pytest

from shared.contracts.bench_report import require_comparable
from shared.errors import UserError
from stages.bench.config import BenchConfig
from stages.bench.report import gates
from tests.measurements import (
    baseline_requests,
    engine,
    head_requests,
    lossless,
    under_load,
)
from tests.quick.bench.report.reports import config, made


def compare(settings: BenchConfig, prompts: str, earlier: dict[str, Any], path: Path) -> None:
    require_comparable(earlier, settings.model_dump(mode="json"), prompts, path)


def test_met_gates_say_nothing() -> None:
    assert gates.shortfalls(made()["gates"]) == []


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"min_acceptance_length": "2.5"}, "acceptance length 2.450 is 0.050 under the gate 2.5"),
        ({"min_speedup": "2.25"}, "speed-up 2.000 is 0.250 under the gate 2.25"),
    ],
)
def test_a_missed_gate_is_named_with_its_shortfall(flags: dict[str, str], told: str) -> None:
    assert gates.shortfalls(made(config(**flags))["gates"]) == [told]


def test_a_wrong_answer_misses_a_gate_unless_nobody_asks() -> None:
    wrong = engine(
        under_load(baseline_requests(), wall_s=12.0), lossless=lossless(wrong=1, identical=3)
    )
    told = gates.shortfalls(made(baseline=wrong)["gates"])
    assert told == ["answers that differ without a tie 1.000 is 1.000 over the gate 0"]
    lenient = config(max_wrong_answers="null")
    assert gates.shortfalls(made(lenient, baseline=wrong)["gates"]) == []


def test_no_answer_compared_is_no_answer_right() -> None:
    none = engine(
        under_load(baseline_requests(), wall_s=12.0),
        lossless=lossless(compared=0, identical=0, prompts_differ=4),
    )
    told = "answers that differ without a tie was not measured, and the gate requires 0"
    assert gates.shortfalls(made(baseline=none)["gates"]) == [told]
    lenient = config(max_wrong_answers="null")
    assert gates.shortfalls(made(lenient, baseline=none)["gates"]) == []


def test_a_regression_against_an_earlier_report() -> None:
    earlier = made()
    slower = {"head": engine(under_load(head_requests(), wall_s=6.6))}  # speed-up 1.82 of 2.0
    settings = config(max_regression="0.1")
    found = made(settings, **slower)
    assert gates.shortfalls(gates.judge(settings, found, earlier)) == []
    strict = config(max_regression="0.05")
    told = gates.shortfalls(gates.judge(strict, found, earlier))
    assert told == ["speed-up against the earlier report 1.818 is 0.082 under the gate 1.9"]


def test_an_earlier_report_of_another_load_is_refused(tmp_path: Any) -> None:
    earlier = made()
    compare(config(), "abc", earlier, tmp_path)
    with pytest.raises(UserError, match="concurrency: 1 then, 8 now"):
        compare(config(concurrency="8"), "abc", earlier, tmp_path)
    with pytest.raises(UserError, match="prompts: abc then, other now"):
        compare(config(), "other", earlier, tmp_path)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"target": "other"}, "target: tiny then, other now"),
        ({"endpoint": "http://x"}, "mode: served then, endpoint now"),
        ({"max_prompts": "3"}, "max_prompts: 2 then, 3 now"),
    ],
)
def test_an_earlier_report_of_something_else_is_refused(
    flags: dict[str, str], told: str, tmp_path: Any
) -> None:
    few = {"max_prompts": "2"}
    earlier = made(config(**few))
    assert (earlier["mode"], earlier["max_prompts"]) == ("served", 2)
    compare(config(**few), "abc", earlier, tmp_path)
    with pytest.raises(UserError, match=rf"measured something else \({told}\)"):
        compare(config(**{**few, **flags}), "abc", earlier, tmp_path)


def test_a_gate_on_what_was_not_measured_is_not_met() -> None:
    gate = {"name": "speed-up", "value": None, "bound": "min", "limit": 1.0, "met": False}
    assert gates.shortfalls([gate]) == ["speed-up was not measured, and the gate requires 1"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"concurrency": "[4,4]"}, "must differ"),
        ({"num_speculative_tokens": "0"}, "expected at least 1"),
        ({"baseline_endpoint": "http://x"}, "baseline_endpoint needs an endpoint"),
        ({"endpoint": "http://x", "head": "y"}, "an endpoint serves its own head"),
        ({"endpoint": "http://x", "min_speedup": "1.1"}, "needs a baseline"),
        ({"endpoint": "http://x", "num_speculative_tokens": "[2,3]"}, "one draft length"),
        ({"min_gain_over_ngram": "1"}, "needs compare_ngram"),
    ],
)
def test_settings_that_contradict_each_other(flags: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        config(**flags)
