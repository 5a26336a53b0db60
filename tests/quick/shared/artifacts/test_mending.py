# SPDX-License-Identifier: Apache-2.0
"""What was finished or saved, and then removed or changed: made again, or refused by name."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from shared.artifacts.artifact import Artifact
from shared.artifacts.checksums import require_unchanged
from shared.artifacts.manifest import read_manifest, require_parent
from shared.errors import RetryableError, UserError
from shared.io import files
from shared.runtime.status import Status
from stages.train import launch as ranks
from stages.train.export import hf as export
from stages.train.loop import checkpoint, distributed, history
from stages.train.loop.checkpoint import Checkpoints
from tests.quick.shared.artifacts.test_manifest import dump_config, finished, synth_config
from tests.stages.train.test_checkpoints import state


def same(workspace: Path, **options: bool) -> Artifact:
    """The artifact that `finished` makes, asked for again."""
    config = synth_config(workspace)
    return Artifact(config.paths.stage("synth"), config, inputs={"prompts": "abc"}, **options)


def cut(path: Path) -> None:
    path.write_text("ro")


@pytest.mark.parametrize("harm", [Path.unlink, cut])
def test_a_finished_artifact_that_is_not_whole_is_not_done(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    done = finished(tmp_path)
    harm(done.folder / "part.txt")
    again = same(tmp_path)
    assert not again.is_done()
    with again.work() as is_needed:
        assert is_needed
        assert read_manifest(again.folder) is None, "a kill from now on must not look complete"


def test_what_cannot_be_mended_is_refused(tmp_path: Path) -> None:
    done = finished(tmp_path)
    (done.folder / "part.txt").unlink()
    with pytest.raises(UserError, match=r"part\.txt: expected 4 bytes .* found no file"):
        same(tmp_path, mends=False).is_done()
    assert read_manifest(done.folder) is not None


def test_what_another_process_finished_meanwhile_is_not_made_again(tmp_path: Path) -> None:
    late = same(tmp_path)
    assert not late.is_done()
    done = finished(tmp_path)
    before = (done.folder / "manifest.json").stat().st_mtime_ns
    with late.work() as is_needed:
        assert not is_needed
    assert (done.folder / "manifest.json").stat().st_mtime_ns == before


def test_other_bytes_of_the_same_size_are_refused(tmp_path: Path) -> None:
    done = finished(tmp_path)
    manifest = read_manifest(done.folder)
    assert manifest is not None
    require_unchanged(done.folder, manifest, manifest["files"])
    (done.folder / "part.txt").write_text("bows")
    with pytest.raises(
        UserError, match=r"part\.txt: expected the SHA-256 .*delete it and run synth"
    ):
        require_unchanged(done.folder, manifest, manifest["files"])


def test_an_edited_identity_does_not_fit_its_fingerprint(tmp_path: Path) -> None:
    path = finished(tmp_path).folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["synth.max_tokens"] = 7
    path.write_text(json.dumps(manifest))
    config = dump_config(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json: its fingerprint"):
        require_parent(path.parent, stage="synth", config=config)


def test_a_killed_writer_of_the_status_leaves_nothing(tmp_path: Path) -> None:
    for name in ("synth", "train"):
        (tmp_path / f".{name}.json.tmp-host-7").write_text("half")
    Status(tmp_path / "synth.json").opened()
    assert {path.name for path in tmp_path.iterdir()} == {"synth.json", ".train.json.tmp-host-7"}


@pytest.fixture
def records(tmp_path: Path) -> history.History:
    alone: Any = SimpleNamespace(is_main_process=True, log=lambda *_, **__: None)
    return history.History(tmp_path / "history.jsonl", alone)


def test_a_history_that_is_gone_is_told_again(records: history.History) -> None:
    records.keep(0)
    records.append(10, {"loss": 2.0})
    records.path.unlink()
    records.append(20, {"loss": 1.0})
    steps = [json.loads(line)["step"] for line in records.path.read_text().splitlines()]
    assert steps == [10, 20]


def test_a_history_on_a_full_disk_is_the_users(records: history.History) -> None:
    records.keep(0)
    records.path.unlink()
    records.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"could not write .*history\.jsonl"):
        records.append(10, {"loss": 2.0})


def test_a_training_whose_best_is_gone_says_how_to_start_anew(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save({**state(10), "best": {"step": 10, "value": 2.0}}, best=True)
    checkpoints.save({**state(20), "best": {"step": 10, "value": 2.0}})
    checkpoints.wait()
    saved = checkpoint.load(tmp_path / checkpoint.LATEST)
    assert saved is not None
    checkpoint.restore_best(tmp_path, saved)
    (tmp_path / "step_00000010.pt").unlink()
    with pytest.raises(
        UserError, match=r"best\.pt: expected the checkpoint of step 10.*latest\.pt"
    ):
        checkpoint.restore_best(tmp_path, saved)


def test_a_link_on_a_read_only_folder_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(UserError, match=r"could not write .*latest\.pt: Read-only"):
        files.write_link(tmp_path / "latest.pt", "step_00000010.pt")


@pytest.mark.parametrize("layout", ["hf", "speculators"])
def test_a_full_disk_in_an_export_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    from tests.quick.train.export.small_head import make_head

    def refuse(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    head, out, made = make_head(), tmp_path / "head", {"target": "t", "provenance": {}}
    monkeypatch.setattr(export, "save_file", refuse)
    with pytest.raises(UserError, match=r"could not write .*No space left"):
        architectures = None if layout == "hf" else []
        export.export_head(head, out, target_architectures=architectures, **made)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[x.cc:1] Connection closed by peer [127.0.0.1]:7"), RetryableError),
        (torch.distributed.DistNetworkError("the store is gone"), RetryableError),
        (RuntimeError("shapes cannot be multiplied"), RuntimeError),
    ],
)
def test_a_rank_that_lost_another_may_try_again(error: Exception, told: type[Exception]) -> None:
    several: Any = SimpleNamespace(num_processes=2)
    alone: Any = SimpleNamespace(num_processes=1)
    with pytest.raises(told) as raised, distributed.together(several):
        raise error
    assert type(raised.value) is told
    with pytest.raises(type(error)), distributed.together(alone):
        raise error


def test_a_killed_rank_outweighs_those_that_missed_it() -> None:
    assert ranks._exit_code([1, -signal.SIGKILL], [1, -9]) == 75
    assert ranks._exit_code([2], [2, -9]) == 2


@pytest.mark.parametrize(
    ("failed", "codes", "expected"),
    [
        ([75, 2], [75, 2], 2),
        ([75], [75, 3], 3),  # told while the first was being ended
        ([75], [75, 1], 1),
        ([3, 2], [3, 2], 3),
        ([75], [75, 143], 75),
        ([75, -signal.SIGKILL], [75, -9], 75),
        ([2, -signal.SIGKILL], [2, -9], 75),
    ],
)
def test_a_rank_that_says_why_outweighs_those_that_lost_it(
    failed: list[int], codes: list[int], expected: int
) -> None:
    assert ranks._exit_code(failed, codes) == expected


def test_a_stop_outweighs_what_ranks_say_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "stop_requested", lambda: True)
    assert ranks._exit_code([75], [75, 143]) == 143
    assert ranks._exit_code([2], [2, 143]) == 143
    assert ranks._exit_code([75], [75, 2]) == 2
    # Ended by the signal itself, or waiting for one that was.
    assert ranks._exit_code([-signal.SIGTERM], [-signal.SIGTERM, -signal.SIGKILL]) == 143
    assert ranks._exit_code([-signal.SIGKILL], [-signal.SIGKILL, 75]) == 75


def test_only_the_named_leftovers_are_swept(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f".{name}.tmp-host-1").touch()
    files.sweep_temporaries(tmp_path, of="a")
    assert [path.name for path in tmp_path.iterdir()] == [".b.tmp-host-1"]


def test_what_others_remove_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several processes of a dump the last one removes the plan, and a window its shards."""
    for name in ("plan/shard_0.pt", "shard_0.pt", "shard_1.pt"):
        files.write_text(tmp_path / name, "four")
    stat, scandir = Path.stat, os.scandir

    def removed(path: Path, **how: Any) -> Any:
        if path.name == "shard_1.pt":
            path.unlink()
        return stat(path, **how)

    def gone(path: Any = ".") -> Any:
        if str(path).endswith("/plan"):
            shutil.rmtree(path)
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", removed)
        patch.setattr(os, "scandir", gone)
        files.sweep_temporaries(tmp_path)
        assert files.bytes_below(tmp_path, "*.pt") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["shard_0.pt"]
