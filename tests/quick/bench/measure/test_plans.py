# SPDX-License-Identifier: Apache-2.0
"""Prompts of the benchmarks that everybody knows, and what an engine is told to do with them."""

import collections
from pathlib import Path
from typing import Any

import pytest

from shared.conversations.template import ChatTemplate
from shared.errors import UserError
from shared.prompts.rows import Prompt, parse_row
from shared.prompts.sources import Source, read_source
from shared.settings import build
from shared.vllm.measured_rows import (
    WARMUP_TEXTS,
    check_room,
    check_warmup,
    conversation_of,
    warmup,
)
from shared.vllm.server import flags
from stages.bench.config import BenchConfig
from stages.bench.measure import plans
from stages.bench.measure.loads import Load, loads_of
from stages.bench.run import OWN_PROMPTS
from tests.models import tiny_llama

MT_BENCH = {"question_id": 81, "category": "writing", "turns": ["Write a post.", "Rewrite it."]}
SPEC_BENCH = {"question_id": 7, "category": "summarization", "turns": ["Sum this up: ..."]}
SPEED_BENCH = {
    "question_id": "a3",
    "category": "qa",
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("row", "steps"),
    [
        (MT_BENCH, ((user("Write a post."),), (user("Rewrite it."),))),
        (SPEC_BENCH, ((user("Sum this up: ..."),),)),
        (SPEED_BENCH, (({"role": "system", "content": "Be brief."}, user("Why?")),)),
        ({"prompt": "Why?"}, ((user("Why?"),),)),
    ],
)
def test_the_steps_of_known_shapes(row: dict[str, Any], steps: Any) -> None:
    made = conversation_of(parse_row(row))
    assert made.steps == steps
    assert made.category == row.get("category", "uncategorised")


def test_a_rows_own_answers_are_history_and_its_last_turn_is_asked() -> None:
    said = {"role": "assistant", "content": "a1"}
    row = {"messages": [user("q1"), said, user("q2")]}
    assert conversation_of(parse_row(row)).steps == ((user("q1"), said, user("q2")),)
    answered = {"messages": [*row["messages"], {"role": "assistant", "content": "a2"}]}
    assert conversation_of(parse_row(answered)).steps == ((user("q1"), said, user("q2")),)


def test_our_own_prompts_cover_eight_categories_and_both_turns(tmp_path: Path) -> None:
    rows = list(read_source(Source(path=str(OWN_PROMPTS)), tmp_path))
    found = [conversation_of(row) for row in rows if isinstance(row, Prompt)]
    assert len(found) == len(rows) == 40
    assert set(collections.Counter(c.category for c in found).values()) == {5}
    assert len({c.category for c in found}) == 8
    assert len({c.id for c in found}) == 40
    assert sum(len(c.steps) == 2 for c in found) >= 8
    check_warmup(found)


def test_a_measured_prompt_that_warms_up_is_refused() -> None:
    warm = conversation_of(parse_row({"id": "x", "prompt": WARMUP_TEXTS[1]}))
    with pytest.raises(UserError, match=r"found them in \['x'\]"):
        check_warmup([warm])


def test_every_combination_is_a_load_and_the_first_is_the_gates() -> None:
    flags = {"concurrency": "[1,8]", "temperature": "[0,0.7]", "max_tokens": "64"}
    config = build(BenchConfig, {"target": "x", **flags})
    assert loads_of(config) == [
        Load(1, 0.0, 64),
        Load(8, 0.0, 64),
        Load(1, 0.7, 64),
        Load(8, 0.7, 64),
    ]


def test_the_engines_of_a_sweep() -> None:
    flags = {"num_speculative_tokens": "[3,5]", "compare_ngram": "true"}
    config = build(BenchConfig, {"target": "x", "speculative_args": "{a: 1}", **flags})
    drafters = plans.drafters_of(config, Path("/head"), {"parallel_drafting": True})
    assert list(drafters) == ["head", "head-k5", "ngram", "ngram-k5", "baseline"]
    assert [plans.depth_of(speculative) for speculative in drafters.values()] == [3, 5, 3, 5, 0]
    assert drafters["head-k5"] == {
        "method": "eagle3",
        "model": "/head",
        "num_speculative_tokens": 5,
        "parallel_drafting": True,
        "a": 1,
    }
    assert "a" not in (drafters["ngram"] or {})
    alone = build(BenchConfig, {"target": "x", "compare_baseline": "false"})
    assert list(plans.drafters_of(alone, Path("/head"))) == ["head"]
    with pytest.raises(UserError, match="min_speedup needs compare_baseline"):
        build(BenchConfig, {"target": "x", "compare_baseline": "false", "min_speedup": "1"})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    tiny_llama(folder / "tiny", max_length_tokens=256)
    return folder


def plan(workspace: Path, rows: list[dict[str, Any]], **flags: str) -> plans.Plan:
    config = build(BenchConfig, {"target": "tiny", "workspace": str(workspace), **flags})
    conversations = [conversation_of(parse_row(row)) for row in rows]
    return plans.plan_of(config, workspace / "tiny", conversations)


def test_the_longest_row_is_planned(workspace: Path) -> None:
    from transformers import AutoTokenizer

    template = ChatTemplate(AutoTokenizer.from_pretrained(workspace / "tiny"))
    text = "Why does the moon have phases, and who first wrote down the right reason?"
    asked = len(template.prompt_ids([user(text)]))
    short = plan(workspace, [{"prompt": text}], max_tokens="[8,32]", num_speculative_tokens="[3,5]")
    assert short.max_model_len == asked + 32 + 3 * 5
    both = plan(workspace, [{"prompt": text}, {"turns": [text, text]}], max_tokens="32")
    assert both.max_model_len > 2 * asked + 2 * 32 + 9  # the first answer is history then
    # A warm-up that is longer than every measured prompt needs its room too.
    warm = max(len(template.prompt_ids(c.steps[0])) for c in warmup())
    tiny = plan(workspace, [{"prompt": "Hi"}], max_tokens="32", num_speculative_tokens="3")
    assert tiny.max_model_len == warm + 32 + 3 * 3


def test_a_row_that_the_target_cannot_hold_is_refused(workspace: Path) -> None:
    with pytest.raises(UserError, match="the engine has 256"):
        plan(workspace, [{"prompt": "Why?"}], max_tokens="16", num_speculative_tokens="100")


def test_room_for_the_drafts_at_the_end() -> None:
    check_room("x", 33, 31, 3, 73)
    with pytest.raises(UserError, match="needs 73 positions"):
        check_room("x", 33, 31, 3, 72)


def test_groups() -> None:
    rows = [{"prompt": str(n), "category": "ab"[n % 2]} for n in range(4)]
    made = [conversation_of(parse_row(row)) for row in rows]
    assert plans.groups(made, one_loop=True) == [(None, made)]
    assert plans.groups(made, one_loop=False) == [("a", made[::2]), ("b", made[1::2])]


def test_an_engine_has_room_for_several_requests(workspace: Path) -> None:
    flags = {"concurrency": "2", "engine_args": "{max_num_seqs: 2}", "max_tokens": "16"}
    enough = plan(workspace, [{"prompt": "Why?"}], **flags)
    assert enough.max_num_seqs == 8


def test_a_switched_off_option_is_switched_off(workspace: Path) -> None:
    from stages.bench.measure.server import options

    own = "{async_scheduling: false, seed: 7, enable_prefix_caching: true}"
    made = plan(workspace, [{"prompt": "Why?"}], engine_args=own, max_tokens="16")
    words = flags(options(made, None))
    assert "--no-async-scheduling" in words and "--async-scheduling" not in words
    assert "--enable-prefix-caching" in words and "--no-enable-prefix-caching" not in words
    assert "--no-enable-chunked-prefill" in words
    assert words[words.index("--seed") + 1] == "7"


def test_the_runs_chat_template_is_the_servers(workspace: Path) -> None:
    from stages.bench.measure.server import options

    assert (
        options(plan(workspace, [{"prompt": "Why?"}], max_tokens="16"), None)["chat-template"]
        is None
    )
    own = workspace / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    made = plan(workspace, [{"prompt": "Why?"}], max_tokens="16", chat_template="own.jinja")
    assert options(made, None)["chat-template"] == own


def test_a_named_chat_template_is_written_and_its_path_is_whole(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command to serve the head has it, which is typed in another folder."""
    from stages.bench.measure.server import options

    monkeypatch.chdir(workspace)
    named = workspace / "tiny" / "additional_chat_templates" / "tool_use.jinja"
    named.parent.mkdir()
    named.write_text("named")
    made = plan(Path(), [{"prompt": "Why?"}], max_tokens="16", chat_template="tool_use")
    template = options(made, None)["chat-template"]
    assert template.is_absolute() and template.read_text() == "named"


def test_the_prompt_that_is_too_long_is_named(workspace: Path) -> None:
    rows = [{"id": "short", "prompt": "Why?"}, {"id": "long", "prompt": "why " * 400}]
    with pytest.raises(UserError, match="prompt long of"):
        plan(workspace, rows, max_tokens="16")
