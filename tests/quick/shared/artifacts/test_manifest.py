# SPDX-License-Identifier: Apache-2.0
"""Artifacts: whole files, manifests, refusals, locks, row accounting."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.artifacts.artifact import Artifact
from shared.artifacts.manifest import fingerprint, read_manifest, require_parent
from shared.errors import OutputError, RetryableError, UserError
from shared.io import files
from shared.runtime.process import lock
from shared.runtime.status import Accounting
from shared.settings import build
from stages.dump.config import DumpConfig
from stages.synth.config import SynthConfig

ROOT = Path(__file__).resolve().parents[4]


def synth_config(workspace: Path, **flags: str) -> SynthConfig:
    return build(
        SynthConfig, {"workspace": str(workspace), "target": "t", "prompts": "p.jsonl", **flags}
    )


def unfinished(workspace: Path, **flags: str) -> Artifact:
    config = synth_config(workspace, **flags)
    return Artifact(config.paths.stage("synth"), config, inputs={"prompts": "abc"})


def finished(workspace: Path, **flags: str) -> Artifact:
    artifact = unfinished(workspace, **flags)
    with artifact.work():
        files.write_text(artifact.folder / "part.txt", "rows")
        facts = {"target_hash": "t", "vocabulary_hash": "v", "greedy": True}
        counts = {"in": 1, "ok": 1, "skipped": {}, "failed": {}}
        artifact.finish(["part.txt"], counts=counts, facts=facts)
    return artifact


def killed_at(patch: pytest.MonkeyPatch, name: str) -> None:
    """Removing a file whose name begins so ends the process; folders list in the worst order."""
    iterdir, unlink = Path.iterdir, Path.unlink

    def identity_first(folder: Path) -> Iterator[Path]:
        yield from sorted(iterdir(folder), key=lambda path: path.name != "identity.json")

    def die(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith(name):
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    patch.setattr(Path, "iterdir", identity_first)
    patch.setattr(Path, "unlink", die)


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path: Path) -> None:
    """A real process is killed in the middle of a real write."""
    path = tmp_path / "file.txt"
    files.write_text(path, "old")
    code = (
        "import time; from pathlib import Path; from shared.io.files import atomic_path\n"
        f"with atomic_path(Path({str(path)!r})) as temporary:\n"
        "    handle = temporary.open('w'); handle.write('half'); handle.flush()\n"
        "    print('writing', flush=True); time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    files.sweep_temporaries(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["file.txt"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.atomic_path(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="could not write"):
        files.write_text(tmp_path / "file" / "x", "text")


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in ("first", "second"):
        with files.atomic_folder(out) as folder:
            (folder / "a").write_text(content)
    assert (out / "a").read_text() == "second"
    with pytest.raises(ZeroDivisionError), files.atomic_folder(out) as folder:
        (folder / "a").write_text("third")
        raise ZeroDivisionError
    assert (out / "a").read_text() == "second"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_finished_means_a_manifest_with_checksums(tmp_path: Path) -> None:
    artifact = finished(tmp_path)
    manifest = read_manifest(artifact.folder)
    assert manifest is not None
    assert manifest["files"]["part.txt"]["bytes"] == 4
    assert manifest["files"]["part.txt"]["sha256"] == files.sha256(artifact.folder / "part.txt")
    assert manifest["fingerprint"] == fingerprint(manifest["identity"])
    assert manifest["provenance"]["packages"]["pyarrow"]


def test_a_second_run_finds_it_done_and_operational_changes_void_nothing(tmp_path: Path) -> None:
    finished(tmp_path)
    config = synth_config(tmp_path, concurrency="3")
    artifact = Artifact(config.paths.stage("synth"), config, inputs={"prompts": "abc"})
    assert artifact.is_done()


@pytest.mark.parametrize("complete", [True, False])
def test_an_identity_change_is_refused_with_its_key_and_nothing_is_lost(
    tmp_path: Path, complete: bool
) -> None:
    done = finished(tmp_path)
    if not complete:
        (done.folder / "manifest.json").unlink()
    config = synth_config(tmp_path, temperature="0.7")
    artifact = Artifact(config.paths.stage("synth"), config, inputs={"prompts": "abc"})
    with pytest.raises(UserError, match=r"synth.temperature: was 0.0, now 0.7"):
        artifact.is_done()
    assert (done.folder / "part.txt").read_text() == "rows"


def test_overwrite_replaces(tmp_path: Path) -> None:
    finished(tmp_path)
    config = synth_config(tmp_path, temperature="0.7", overwrite="true")
    artifact = Artifact(config.paths.stage("synth"), config, inputs={"prompts": "abc"})
    assert not artifact.is_done()
    with artifact.work():
        assert not (artifact.folder / "part.txt").exists()
        assert read_manifest(artifact.folder) is None


def test_overwrite_keeps_the_old_where_the_new_cannot_be_recorded(tmp_path: Path) -> None:
    old = finished(tmp_path)
    config = synth_config(tmp_path, overwrite="true").model_copy(update={"temperature": math.inf})
    with pytest.raises(ValueError, match="not JSON compliant"), Artifact(old.folder, config).work():
        pass
    assert read_manifest(old.folder)
    assert (old.folder / "part.txt").read_text() == "rows"


def test_overwrite_replaces_what_cannot_be_read(tmp_path: Path) -> None:
    (finished(tmp_path).folder / "manifest.json").write_text('{"schem`_version": 1}')
    config = synth_config(tmp_path, overwrite="true")
    artifact = Artifact(config.paths.stage("synth"), config, inputs={"prompts": "abc"})
    assert not artifact.is_done()
    with artifact.work() as is_needed:
        assert is_needed
        assert not (artifact.folder / "part.txt").exists()


def test_overwrite_given_again_continues_what_it_began(tmp_path: Path) -> None:
    part = finished(tmp_path).folder / "part.txt"
    hot = {"temperature": "0.7", "overwrite": "true"}
    with unfinished(tmp_path, **hot).work():
        files.write_text(part, "new rows")
    again = unfinished(tmp_path, **hot)
    assert not again.is_done()
    with again.work() as is_needed:
        assert is_needed
        assert part.read_text() == "new rows"
        again.finish([part.name], counts={"in": 1, "ok": 1, "skipped": {}, "failed": {}})
    with unfinished(tmp_path, **hot).work():  # finished meanwhile: now it is to be replaced
        assert not part.exists()
        files.write_text(part, "newer rows")
    with unfinished(tmp_path, overwrite="true").work():  # and what another one left
        assert not part.exists()


def test_a_kill_while_overwrite_deletes_its_own_keeps_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = finished(tmp_path).folder / "part.txt"
    again = unfinished(tmp_path, overwrite="true")
    with monkeypatch.context() as patch:
        killed_at(patch, part.name)
        with pytest.raises(KeyboardInterrupt), again.work():
            pass
    with pytest.raises(UserError, match="overwrite: was 'begun'"):
        unfinished(tmp_path).is_done()
    with again.work():
        assert not part.exists()


def test_a_kill_while_overwrite_deletes_leaves_nothing_to_adopt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = finished(tmp_path).folder / "part.txt"
    new = unfinished(tmp_path, temperature="0.7", overwrite="true")
    with monkeypatch.context() as patch:
        killed_at(patch, part.name)
        with pytest.raises(KeyboardInterrupt), new.work():
            pass
    assert read_manifest(part.parent) is None
    assert part.read_text() == "rows"
    with pytest.raises(UserError, match=r"unfinished .*synth.temperature: was 0.0, now 0.7"):
        unfinished(tmp_path, temperature="0.7").is_done()
    with new.work():
        assert not part.exists()


def test_changed_input_is_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    config = synth_config(tmp_path)
    artifact = Artifact(config.paths.stage("synth"), config, inputs={"prompts": "other"})
    with pytest.raises(UserError, match=r"input.prompts"):
        artifact.is_done()


def dump_config(workspace: Path, **flags: str) -> DumpConfig:
    return build(DumpConfig, {"workspace": str(workspace), "target": "t", **flags})


def test_a_parent_must_be_complete_whole_and_of_the_same_run(tmp_path: Path) -> None:
    config = dump_config(tmp_path)
    folder = config.paths.stage("synth")
    with pytest.raises(UserError, match=r"python -m stages\.synth"):
        require_parent(folder, stage="synth", config=config)
    finished(tmp_path)
    assert require_parent(folder, stage="synth", config=config)["stage"] == "synth"
    with pytest.raises(UserError, match=r"run.max_length_tokens: was 2048, now 64"):
        other = dump_config(tmp_path, max_length_tokens="64")
        require_parent(folder, stage="synth", config=other)
    (folder / "part.txt").write_text("ro")
    with pytest.raises(UserError, match="expected 4 bytes as in the manifest, found 2"):
        require_parent(folder, stage="synth", config=config)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1}', '{"a": ' * 50000])
def test_a_damaged_manifest_is_a_users_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_two_processes_cannot_hold_one_folder(tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path; from shared.runtime.process import lock\n"
        f"with lock(Path({str(tmp_path / '.lock')!r})):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(RetryableError, match="another process"), lock(tmp_path / ".lock"):
        pass
    holder.kill()
    holder.wait()
    with lock(tmp_path / ".lock"):  # a dead holder holds nothing
        pass


def test_accounting_adds_up_and_refuses_bad_outcomes(tmp_path: Path) -> None:
    accounting = Accounting()
    rejects = tmp_path / "rejects.jsonl"
    with pytest.raises(UserError, match="at least one row"):
        accounting.check(max_failed_fraction=1, label="w", rejects=rejects)
    accounting.skip("a", "too_long")
    with pytest.raises(OutputError, match="none of 1 rows is usable"):
        accounting.check(max_failed_fraction=1, label="w", rejects=rejects)
    accounting.ok += 8
    accounting.fail("b", "broken_json", "line\x1b[31m")
    accounting.check(max_failed_fraction=0.1, label="w", rejects=rejects)
    with pytest.raises(OutputError, match="1 of 10 rows failed"):
        accounting.check(max_failed_fraction=0.09, label="w", rejects=rejects)
    counts = accounting.as_dict()
    assert counts["in"] == counts["ok"] + 1 + 1 == 10
    accounting.write_rejects(rejects)
    text = rejects.read_text()
    assert [json.loads(line)["row"] for line in text.splitlines()] == ["a", "b"]
    assert "\x1b" not in text


def test_a_stop_signal_ends_a_stage_with_143(tmp_path: Path) -> None:
    """A real process, asked to stop while it works, saves and says so."""
    code = (
        "import time, sys\n"
        "from shared.runtime import process\n"
        "process.catch_stop_signals(); print('ready', flush=True)\n"
        "try:\n"
        "    while True: time.sleep(0.05); process.stop_if_requested('saved')\n"
        "except process.Stopped as stopped: sys.exit(stopped.exit_code)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert worker.stdout is not None
    worker.stdout.readline()
    os.kill(worker.pid, signal.SIGTERM)
    assert worker.wait(timeout=60) == 143
