# SPDX-License-Identifier: Apache-2.0
"""Rows that their stage could not use are named before the first stage."""

import asyncio
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from shared.paths import RunPaths
from shared.prompts.rows import Prompt
from shared.settings import build
from shared.target.special_tokens import SpecialTokens
from shared.target.tokenizer import load_tokenizer
from stages.ops.chain import asked as chain_asked
from stages.ops.chain.estimates import Estimates
from stages.ops.chain.preflight import checks
from stages.ops.chain.preflight.rows import row_warnings
from stages.ops.chain.rows import Look, Looks
from stages.synth import mixture
from stages.synth.client import Client
from stages.synth.config import SynthConfig
from tests.quick.ops.chain.recipes import CPU, KEPT, problems, steps


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


WORDS, TOKEN = "why " * 400, "Say <|im_end|>"  # more than the recipe's 64 tokens; the target's own
MANY_TURNS = [{"role": "user", "content": "a"}, ANSWER, {"role": "user", "content": WORDS}]


def asked(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def write_asked(workspace: Path, *chats: list[dict[str, Any]]) -> dict[str, Any]:
    """A file of chats as synth's prompts: those that say the same get another id alone."""
    path = workspace / "chats.jsonl"
    rows = [{"id": str(number), "messages": chat} for number, chat in enumerate(chats)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"prompts": str(path), "deduplicate": False}


@pytest.mark.parametrize(
    ("chat", "settings", "found"),
    [
        (asked(TOKEN), {}, r"none \(3 special_token_in_text\). Take the control tokens out"),
        (asked(WORDS), {}, r"none \(3 too_long\). Give shorter prompts, or raise run.max_length"),
        (MANY_TURNS, {"mode": "complete"}, "3 too_long"),
        ([*asked(TOKEN), ANSWER], {"mode": "keep"}, "3 special_token_in_text"),
        # What synth answers.
        (asked(TOKEN), {"special_token_text": "allow"}, ""),
        (MANY_TURNS, {}, ""),  # the first turn
        (asked(WORDS), {"server_args": {"tokenizer-mode": "mistral"}}, ""),
    ],
)
def test_rows_that_the_target_cannot_be_asked_are_refused_where_none_is_left(
    real_target: Path, chat: list[dict[str, Any]], settings: dict[str, Any], found: str
) -> None:
    chosen = {"synth": write_asked(real_target, *[chat] * 3) | settings}
    told = problems(steps(real_target, chosen), real_target)
    assert len(told) == bool(found)
    assert not told or re.search(f"synth.prompts: .*chats.jsonl: .*{found}", told[0])


@pytest.mark.parametrize("dropped", [TOKEN, WORDS])
def test_many_rows_that_the_target_cannot_be_asked_are_told_and_not_counted(
    real_target: Path, dropped: str
) -> None:
    def told(*chats: list[dict[str, Any]]) -> tuple[list[str], str]:
        chain, looks = (
            steps(real_target, {"synth": write_asked(real_target, *chats)}),
            Looks(real_target),
        )
        paths = RunPaths(real_target, "run")
        assert checks.problems(chain, paths, CPU, looks) == []
        work = {row.stage: row.work for row in Estimates(chain, paths, CPU, looks).rows()}
        assert work["dump"] == work["synth"]
        return list(row_warnings(chain, looks)), work["synth"]

    (warning,), work = told(*[asked("Why?")] * 3, *[asked(dropped)] * 2)
    assert "chats.jsonl: nothing comes of 40% of the prompts: 2 " in warning
    assert work == "3 rows, at most 192 tokens"
    warnings, work = told(*[asked("Why?")] * 19, asked(dropped))
    assert warnings == [] and work == "19 rows, at most 1,216 tokens"


def test_a_source_of_which_nothing_is_left_is_no_obstacle_beside_others(real_target: Path) -> None:
    path = write_asked(real_target, asked(WORDS))["prompts"]
    both = {"prompts": None, "sources": [{"path": path}, {"path": "prompts.jsonl"}]}
    chain, looks = steps(real_target, {"synth": both}), Looks(real_target)
    assert checks.problems(chain, RunPaths(real_target, "run"), CPU, looks) == []
    (warning,) = row_warnings(chain, looks)
    assert "nothing comes of 100% of the prompts: 1 too_long" in warning


def test_of_many_long_rows_some_are_tokenised(
    real_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others count as those, and are not refused: they may be shorter."""
    monkeypatch.setattr(chain_asked, "_MAX_TOKENIZED", 4)
    chats = [*[asked(WORDS)] * 3, *[asked("Why?")] * 5]
    chain, looks = (
        steps(real_target, {"synth": write_asked(real_target, *chats)}),
        Looks(real_target),
    )
    assert looks.left(chain[0]) == 0.25
    none_seen = write_asked(real_target, *[asked(WORDS)] * 9)
    assert problems(steps(real_target, {"synth": none_seen}), real_target) == []


@pytest.mark.parametrize("mode", ["regenerate", "complete"])
def test_synth_itself_refuses_the_same_rows(real_target: Path, mode: str) -> None:
    """By its client, without a server: control tokens are refused before a request."""
    chats = [asked(TOKEN), [*asked("a"), ANSWER, *asked(TOKEN)]]
    chain = steps(real_target, {"synth": write_asked(real_target, *chats) | {"mode": mode}})
    (look,) = Looks(real_target).of(chain[0])
    assert isinstance(look, Look)
    config = build(
        SynthConfig, {"recipe": str(real_target / "recipe.yaml"), "workspace": str(real_target)}
    )
    special = SpecialTokens(load_tokenizer(real_target / "model", trust_remote_code=False))

    async def refusals() -> int:
        client = Client([], config, (), special)
        try:
            found = 0
            for prompt in mixture.prompts(config):
                assert isinstance(prompt, Prompt)
                try:
                    outcome = await client.answer(prompt)
                    found += outcome.refused is not None
                except ZeroDivisionError:  # it would be asked: there is no endpoint
                    pass
            return found
        finally:
            await client.close()

    assert asyncio.run(refusals()) == look.reasons.total()
