# SPDX-License-Identifier: Apache-2.0
"""What adapt looks at before it starts, and what it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.contracts.head_folder import read_head
from shared.contracts.hidden_states import TOKEN_FREQ
from shared.errors import EXIT_DONE, OutputError, UserError
from shared.paths import RunPaths
from stages.ops.adapt.run import _vocabulary_shares, run
from stages.ops.chain import run as chain
from tests.heads import write_random_head
from tests.models import tiny_llama
from tests.quick.ops.adapt.benches import write_bench
from tests.quick.ops.adapt.conftest import asked, write_recipe


def files_in(workspace: Path) -> set[Path]:
    return {each for each in workspace.rglob("*") if each.is_file() and each.parent.name != "logs"}


@pytest.mark.usefixtures("no_processes")
def test_a_dry_run_shows_both_plans_and_leaves_nothing(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_in(workspace)
    assert run(asked(workspace, dry_run=True)) == EXIT_DONE
    shown = capsys.readouterr().out
    assert "new-before" in shown
    assert "52 rows" in shown  # eight are held out
    assert files_in(workspace) == before


@pytest.mark.usefixtures("no_processes")
def test_a_recipe_that_drafts_one_token_is_taken(workspace: Path) -> None:
    write_recipe(workspace, {"bench": {"num_speculative_tokens": 1}})
    assert run(asked(workspace, dry_run=True)) == EXIT_DONE


def test_what_a_stage_refuses_is_told_of_the_recipe_that_was_given(workspace: Path) -> None:
    path = write_recipe(workspace, {"train": {"epoch": 1}})
    before = files_in(workspace)
    with pytest.raises(UserError, match="train refuses") as refused:
        run(asked(workspace))
    assert f"unknown key in {path}. Did you mean epochs?" in refused.value.problem
    assert "eyrie-adapt" not in refused.value.problem
    assert files_in(workspace) == before


def test_the_figures_that_decide_are_kept_where_others_cannot_be_made(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def finished(config: Any) -> int:
        write_bench(RunPaths(workspace, config.recipe.parent.name), [2.0] * 8)
        return EXIT_DONE

    monkeypatch.setattr(chain, "look_ahead", lambda *_, **__: None)
    monkeypatch.setattr(chain, "run", finished)  # dump has left no counts
    with pytest.raises(OutputError) as missed:
        run(asked(workspace))
    assert "what the draft vocabularies hold is not known" in caplog.text
    assert "another run.name, or with --overwrite" in missed.value.remedy
    assert "of 2% or more, whose 95 % interval over the 8 held-out chats lies above 0" in str(
        missed.value.problem
    )
    found = json.loads((workspace / "new" / "adapt.json").read_text())
    assert (found["before"], found["after"], found["improved"]) == (2.0, 2.0, False)
    assert found["rows"]["held_out"] == 8


@pytest.mark.parametrize("is_ascending", [True, False])
def test_the_share_of_the_new_answers_that_each_vocabulary_holds(
    tmp_path: Path, is_ascending: bool
) -> None:
    target, run = tiny_llama(tmp_path / "tiny"), RunPaths(tmp_path, "new")
    write_random_head(tmp_path / "old", target=target, draft_vocab_size=128, aux_layers=(1, 3, 5))
    write_random_head(run.export, target=target, aux_layers=(1, 3, 5))  # all tokens: no d2t
    path = tmp_path / "old" / "model.safetensors"
    if not is_ascending:  # as other makers' heads have it
        tensors = load_file(path)
        ids = (tensors["d2t"] + torch.arange(128)).flip(0)
        save_file({**tensors, "d2t": ids - torch.arange(128)}, path)
    old = read_head(tmp_path / "old")
    d2t = old.tensor("d2t")
    assert d2t is not None
    own = (d2t + torch.arange(128)).tolist()
    counts = torch.zeros(512, dtype=torch.int64)
    counts[own[5]] = 3
    counts[next(i for i in range(512) if i not in own)] = 1
    run.stage("dump").mkdir(parents=True)
    torch.save(counts, run.stage("dump") / TOKEN_FREQ)
    found = _vocabulary_shares(old, run)
    assert found == {"vocabulary_share_before": 0.75, "vocabulary_share_after": 1.0}
