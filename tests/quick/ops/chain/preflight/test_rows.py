# SPDX-License-Identifier: Apache-2.0
"""Rows that their stage could not use are named before the first stage."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.quick.ops.chain.recipes import KEPT, problems, steps


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("p.jsonl", b"", "it is empty"),
        ("p.jsonl", b'{"text": "a"}\n{"text": "b"}\n{', "2 no_prompt, 1 broken_json"),
        ("p.jsonl", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (
            "p.jsonl.gz",
            gzip.compress(b'{"prompt": "a"}\n' * 9, mtime=0)[:-9],
            "Compressed file ended",
        ),
    ],
)
def test_rows_that_no_stage_can_use_are_refused(
    name: str, content: bytes, found: str, workspace: Path
) -> None:
    (workspace / name).write_bytes(content)
    (line,) = problems(steps(workspace, {"synth": {"prompts": name}}), workspace)
    assert found in line


def test_a_look_at_the_rows_says_nothing_of_what_the_stage_itself_will_say(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (workspace / "p.jsonl").write_text('{"prompt": "a", "notes": "never read"}\n')
    assert problems(steps(workspace, {"synth": {"prompts": "p.jsonl"}}), workspace) == []
    assert not caplog.messages


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
OPEN, ANSWERED = [USER], [USER, ANSWER]
GAP = [USER, {**ANSWER, "content": ""}, USER, ANSWER]
UNTRAINED = [USER, {**ANSWER, "weight": 0}]


def written(workspace: Path, chats: list[list[dict[str, Any]]]) -> Path:
    """A file of different rows."""
    path = workspace / "chats.jsonl"
    rows = (
        {"messages": [{**chat[0], "content": str(number)}, *chat[1:]]}
        for number, chat in enumerate(chats)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("changes", "chats", "found"),
    [
        ({"synth": {"mode": "keep"}}, [OPEN] * 3, "found none (3 no_answer). Give rows with ans"),
        ({"synth": {"mode": "keep"}}, [UNTRAINED], "found none (1 answer_of_weight_0). Give rows"),
        ({"synth": {"mode": "complete"}}, [GAP], "found none (1 unanswered_turn). Give rows with"),
        ({"dump": {"conversations": True}}, [OPEN], "found none (1 no_answer). Give rows with"),
        ({"synth": {"mode": "regenerate"}}, [OPEN, GAP, UNTRAINED], ""),
        ({"synth": {"mode": "complete"}}, [OPEN, ANSWERED], ""),
        ({"synth": {"mode": "keep"}}, [[*ANSWERED, USER], ANSWERED, UNTRAINED], ""),
        # As many as may fail, and one more.
        ({"synth": {"mode": "keep"}}, [ANSWERED] * 49 + [OPEN], ""),
        (
            {"synth": {"mode": "keep"}},
            [ANSWERED] * 48 + [OPEN] * 2,
            "expected at most 2% of the rows unusable, found 2 of 50 (2 no_answer). Give rows",
        ),
        ({"synth": {"mode": "keep", "max_samples": 48}}, [ANSWERED] * 48 + [OPEN] * 2, ""),
        ({"dump": {"conversations": True}}, [ANSWERED, OPEN], ""),  # which dump leaves out
    ],
)
def test_rows_without_the_answers_that_their_stage_takes_are_refused(
    workspace: Path,
    changes: dict[str, dict[str, Any]],
    chats: list[list[dict[str, Any]]],
    found: str,
) -> None:
    path = written(workspace, chats)
    (stage,) = changes
    chosen = {
        stage: changes[stage] | {("prompts" if stage == "synth" else "conversations"): str(path)}
    }
    told = problems(steps(workspace, chosen), workspace)
    assert len(told) == bool(found)
    assert not told or (told[0].startswith(f"{stage}.") and found in told[0])


@pytest.mark.parametrize(("max_prompts", "is_refused"), [(2, False), (None, True)])
def test_a_prompt_that_bench_cannot_use_is_refused_where_bench_reads_it(
    workspace: Path, max_prompts: int | None, is_refused: bool
) -> None:
    path = written(workspace, [OPEN] * 2)
    path.write_text(path.read_text() + '{"text": "a"}\n')
    chosen = {"bench": {"prompts": str(path), "max_prompts": max_prompts}}
    told = problems(steps(workspace, chosen), workspace)
    assert len(told) == is_refused
    assert not told or "at most 0% of the rows unusable, found 1 of 3 (1 no_prompt)" in told[0]


def test_answers_that_are_there_are_no_obstacle(workspace: Path) -> None:
    assert problems(steps(workspace, {"synth": KEPT}), workspace) == []
