# SPDX-License-Identifier: Apache-2.0
"""A chain: which stages it is of, its dry run, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any

import pytest

from shared.artifacts.artifact import Artifact
from shared.artifacts.manifest import fingerprint
from shared.errors import EXIT_STOPPED, UserError
from shared.paths import RunPaths
from shared.settings import build
from stages.ops.chain import processes
from stages.ops.chain import run as chain
from stages.ops.chain.run import _show_page, closing_line, look_ahead, run
from stages.train.config import TrainConfig
from tests.quick.ops.chain.recipes import ROOT, config, steps, write


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        ({}, ("synth", "dump", "train", "bench")),
        ({"from": "train"}, ("train", "bench")),
        ({"skip": "synth,dump"}, ("train", "bench")),
        ({"only": "bench,dump", "skip": "bench"}, ("dump",)),
        ({"only": "dump,train", "from": "train"}, ("train",)),
    ],
)
def test_which_stages_are_meant(
    workspace: Path, flags: dict[str, str], stages: tuple[str, ...]
) -> None:
    assert config(workspace, **flags).stages == stages


def test_each_stage_is_asked_what_it_makes_of_the_recipe(workspace: Path) -> None:
    """The other tests ask the same configs in this process."""
    chosen = config(workspace, skip="synth")
    asked = processes.steps(
        chosen, chosen.stages, processes.run_paths(chosen.recipe, chosen.workspace)
    )
    assert asked == steps(workspace)[1:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"from": "tarin"}, "expected 'synth', 'dump', 'train' or 'bench'"),
        ({"skip": "synth,dumb"}, "stages are synth"),
        ({"only": "synth", "from": "dump"}, "leave no stage to run"),
        ({"form": "dump"}, "Did you mean from"),
    ],
)
def test_a_chain_of_nothing_is_refused(
    workspace: Path, flags: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config(workspace, **flags)


@pytest.mark.parametrize(("given", "ranks"), [({}, "2"), ({"EYRIE_RANKS": "1"}, "1")])
def test_train_gets_a_rank_for_each_visible_gpu(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], ranks: str
) -> None:
    tool = workspace / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'A, 10\\nB, 20\\nC, 30\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(workspace), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    play(monkeypatch, workspace, "train", f"echo $2 $EYRIE_RANKS > {workspace}/started")
    assert run(config(workspace, preflight="false", only="train")) == 0
    assert (workspace / "started").read_text().split() == ["stages.train.launch", ranks]


def ops(workspace: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.ops", "run", *words, "--workspace", str(workspace)]
    command += ["--recipe", str(workspace / "recipe.yaml")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_several_obstacles_are_a_line_each_and_counted(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(workspace, {"synth": {"prompts": "gone.jsonl"}, "bench": {"prompts": "/gone.jsonl"}})
    with pytest.raises(UserError, match="the chain would fail, for 2 reasons") as last:
        run(config(workspace, dry_run="true"))
    (first,) = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert "synth.prompts: expected a file" in first
    assert last.value.code == "preflight-failed"
    assert "bench.prompts: expected a file" in last.value.problem
    assert (
        "at /gone.jsonl, or a hub data set" in last.value.problem
    )  # an absolute path is one place


def test_a_dry_run_shows_the_plan_and_makes_nothing(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(workspace.rglob("*"))
    assert run(config(workspace, dry_run="true")) == 0
    assert "at most 163.8 kB" in capsys.readouterr().out
    write(workspace, {"run": {"draft_vocab_size": 600}})
    expected = "run.draft_vocab_size: expected at most the target's 512 tokens"
    with pytest.raises(UserError, match=expected):
        run(config(workspace, dry_run="true"))
    assert "at most 163.8 kB" in capsys.readouterr().out
    write(workspace, {"train": {"epoch": 1}})
    refused = ops(workspace, "--skip", "synth,dump")
    assert refused.returncode == 2
    assert "train refuses" in refused.stderr
    assert "Did you mean epochs?" in refused.stderr
    assert sorted(workspace.rglob("*")) == before


def test_finished_conversations_need_no_synth(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (workspace / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    write(workspace, {"synth": {"prompts": None}, "dump": {"conversations": "chats.jsonl"}})
    assert run(config(workspace, dry_run="true", skip="synth")) == 0
    assert "1 row, at most 64 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="synth refuses"):
        run(config(workspace, dry_run="true"))


def test_a_dry_run_has_no_page_to_open(workspace: Path) -> None:
    with pytest.raises(UserError, match="makes no report's page for --open to show"):
        config(workspace, dry_run="true", open="true")


def play(monkeypatch: pytest.MonkeyPatch, workspace: Path, stage: str, script: str) -> None:
    """Let a stage be this script of a shell."""
    python = workspace / f"python-{stage}"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setenv(f"EYRIE_{stage.upper()}_PYTHON", str(python))


@pytest.mark.parametrize(
    ("script", "code"),
    [("kill -KILL $$", 137), ("kill -SEGV $$", 139), ("exit 75", 75), ("exit 143", 143)],
)
def test_what_ended_a_stage_is_told_as_a_shell_tells_it(
    workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    script: str,
    code: int,
) -> None:
    caplog.set_level("INFO")
    play(monkeypatch, workspace, "synth", script)
    assert run(config(workspace, preflight="false", only="synth")) == code
    (told,) = [record for record in caplog.records if "ended with exit code" in record.message]
    assert told.levelname == ("INFO" if code == EXIT_STOPPED else "ERROR")


def test_a_stage_that_outlives_its_grace_was_killed(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.ops.chain.run._GRACE_S", 0.1)
    deaf = workspace / "deaf"
    monkeypatch.setattr("stages.ops.chain.run.stop_requested", deaf.exists)
    play(monkeypatch, workspace, "synth", f"trap '' TERM; touch {deaf}; exec sleep 60")
    assert run(config(workspace, preflight="false", only="synth")) == 137


def test_a_stage_that_only_lost_the_other_is_not_the_cause(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train says in its status that it failed; dump reads that, and may be gone first."""
    write(workspace, {"dump": {"window_shards": 4}, "train": {"follow": True}})
    begun = workspace / "begun"
    play(monkeypatch, workspace, "dump", f"until [ -e {begun} ]; do sleep 0.05; done; exit 75")
    play(monkeypatch, workspace, "train", f"trap 'exit 2' TERM; touch {begun}; sleep 60 & wait")
    assert run(config(workspace, preflight="false", only="dump,train")) == 2


def test_of_two_that_end_between_two_looks_the_cause_counts(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(workspace, {"dump": {"window_shards": 4}, "train": {"follow": True}})
    play(monkeypatch, workspace, "dump", "exit 75")
    play(monkeypatch, workspace, "train", "exit 2")
    start = chain._start

    def late(*how: Any) -> "subprocess.Popen[bytes]":
        started = start(*how)
        started.wait()
        return started

    monkeypatch.setattr(chain, "_start", late)
    assert run(config(workspace, preflight="false", only="dump,train")) == 2


def test_ctrl_c_that_ends_a_stage_while_it_imports_is_a_stop(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, workspace, "synth", "kill -INT $PPID; kill -INT $$")
    done = ops(workspace, "--preflight", "false", "--only", "synth")
    assert done.returncode == EXIT_STOPPED, done.stderr


def test_ctrl_c_while_the_stages_answer_is_a_stop_and_no_refusal(workspace: Path) -> None:
    """A terminal sends it to them as well."""
    answering = workspace / "answering"
    python = workspace / "python-synth"
    python.write_text(f"#!/bin/sh\ntouch {answering}; exec sleep 600\n")
    python.chmod(0o755)
    command = [sys.executable, "-m", "stages.ops", "run", "--workspace", str(workspace)]
    command += ["--recipe", str(workspace / "recipe.yaml"), "--only", "synth"]
    environment = {**os.environ, "EYRIE_SYNTH_PYTHON": str(python)}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        until = time.monotonic() + 60
        while not answering.exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, said
    assert "no stage was begun" in said


def test_a_stop_between_two_stages_begins_no_other(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal arrives while a stage ends by itself, with 0."""
    play(monkeypatch, workspace, "synth", "kill -TERM $PPID")
    play(monkeypatch, workspace, "dump", f"touch {workspace}/begun")
    done = ops(workspace, "--preflight", "false", "--only", "synth,dump")
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert "[stopped] stopped by a signal; dump was not begun." in done.stderr
    assert not (workspace / "begun").exists()


def test_the_page_is_named_as_a_link_and_opened_where_a_desktop_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    paths = RunPaths(tmp_path, "a run")
    _show_page(paths, opens=True)
    assert not caplog.text
    page = paths.report.with_suffix(".html")
    page.parent.mkdir(parents=True)
    page.write_text("<p>")
    _show_page(paths, since_s=time.time() + 5, opens=False)  # an earlier attempt's
    assert not caplog.text
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}.new && mv {opened}.new {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setattr(webbrowser, "_tryorder", None)
    monkeypatch.setenv("BROWSER", str(browser))
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    _show_page(paths, opens=True)
    assert f"file://{tmp_path}/a%20run/bench/report.html" in caplog.text
    assert "no desktop" in caplog.text and not opened.exists()
    monkeypatch.setenv("DISPLAY", ":0")
    _show_page(paths, opens=True)
    assert opened.read_text() == page.as_uri()


def test_a_dry_run_says_what_a_finished_stage_will_say(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = config(workspace, only="train", dry_run="true")
    paths = processes.run_paths(chosen.recipe, chosen.workspace)
    trained = build(TrainConfig, {"recipe": str(chosen.recipe), "workspace": str(workspace)})
    # `auto` in the recipe is a number in the manifest.
    trained = trained.model_copy(update={"learning_rate": 1e-3, "batch_tokens": 512})
    for folder in (paths.stage("train"), paths.export):
        artifact = Artifact(folder, trained, parents={"dump": {"fingerprint": "of a dump"}})
        del artifact.identity["train.init_vocabulary"]  # as if it were older than this setting
        artifact.fingerprint = fingerprint(artifact.identity)
        with artifact.work():
            counts = {"in": 1, "ok": 1, "skipped": {}, "failed": {}}
            artifact.finish([], counts=counts)
    assert run(chosen) == 0
    assert "done" in capsys.readouterr().out
    overwriting = config(workspace, only="train", overwrite="true")
    (step,) = processes.steps(overwriting, ("train",), paths)
    assert (step.done, step.refusal) == (False, "")
    write(workspace, {"train": {"ttt_steps": 5}})
    with pytest.raises(UserError, match=r"train: .*\(train.ttt_steps: was 3, now 5\).*overwrite"):
        run(chosen)
    assert "done" not in capsys.readouterr().out


def test_artifacts_of_other_settings_are_told_ahead_even_where_all_is_done(workspace: Path) -> None:
    chosen = config(workspace, only="train")
    paths = RunPaths(workspace, "run")
    trained = build(TrainConfig, {"recipe": str(chosen.recipe), "workspace": str(workspace)})
    for folder in (paths.stage("train"), paths.export):
        artifact = Artifact(folder, trained, parents={"dump": {"fingerprint": "of a dump"}})
        with artifact.work():
            artifact.finish([], counts={"in": 1, "ok": 1, "skipped": {}, "failed": {}})
    look_ahead(chosen, paths, even_if_done=True)
    write(workspace, {"train": {"ttt_steps": 5}})
    look_ahead(chosen, paths)
    with pytest.raises(UserError, match=r"train.ttt_steps: was 3, now 5"):
        look_ahead(chosen, paths, even_if_done=True)


@pytest.mark.parametrize(
    ("bench", "head"),
    [
        ({}, "run/export"),
        ({"head": "org/head"}, "org/head"),
        ({"endpoint": "http://127.0.0.1:8000"}, "http://127.0.0.1:8000"),
    ],
)
def test_the_last_line_names_what_was_measured(
    workspace: Path, bench: dict[str, str], head: str
) -> None:
    paths = RunPaths(workspace, "run")
    recipe = write(workspace, {"bench": bench})
    paths.report.parent.mkdir(parents=True)
    paths.report.write_text('{"head": {"acceptance": {"acceptance_length": 2.5}}}')
    recipe.rename(paths.recipe)
    head = str(workspace / head) if head.startswith("run/") else head
    assert closing_line(paths).split()[2] == f"head={head}"
