# SPDX-License-Identifier: Apache-2.0
"""Several processes make one artifact: no shard lost, none twice, one manifest."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.artifacts.artifact import Artifact
from shared.artifacts.manifest import MANIFEST, read_manifest
from shared.artifacts.sharding import INDEX_VARIABLE, ShardedConfig
from shared.config import identity
from shared.errors import RetryableError, UserError
from shared.runtime.process import Share, lock
from shared.settings import build
from tests.quick.shared.artifacts.test_manifest import killed_at

ROOT = Path(__file__).resolve().parents[4]
NUM_ITEMS = 7


class Config(ShardedConfig):
    section = "dump"
    consumes = ("target",)
    flavour: str = identity("plain", "Changes the result.")


def config(workspace: Path, **flags: object) -> Config:
    texts = {name: str(value) for name, value in flags.items()}
    return build(Config, {"workspace": str(workspace), "target": "t", **texts})


def work(config: Config, *, seconds_an_item: float = 0.0) -> None:
    """A stage as small as can be, in the shape that `shared/artifacts/sharding.py` asks for."""
    artifact = Artifact(config.paths.stage("dump"), config)
    if artifact.is_done():
        return
    paths = [artifact.folder / f"item-{index}" for index in range(NUM_ITEMS)]
    with artifact.work():
        for index, path in enumerate(paths):
            if config.share.owns(index) and not path.exists():
                time.sleep(seconds_an_item)
                with path.open("a") as handle:
                    handle.write(f"{index}\n")
        if all(path.exists() for path in paths):
            with artifact.finishing() as mine:
                if mine:
                    names = [path.name for path in paths]
                    counts = {"in": NUM_ITEMS, "ok": NUM_ITEMS, "skipped": {}, "failed": {}}
                    dumped = {"target_hash": "", "aux_layers": [2], "greedy": True}
                    facts = {**dumped, "by": config.share.index}
                    artifact.finish(names, counts=counts, facts=facts)


def test_every_item_once_and_one_manifest_by_the_last(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "dump"
    for index in (2, 0):
        work(config(tmp_path, shard_index=index, num_shards=3))
        assert read_manifest(folder) is None
    work(config(tmp_path, shard_index=1, num_shards=3))
    assert [path.read_text() for path in sorted(folder.glob("item-*"))] == [
        f"{index}\n" for index in range(NUM_ITEMS)
    ]
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest["facts"]["by"] == 1
    # Another run, of one process or of several, finds it done: the split is no part of the result.
    for flags in ({}, {"shard_index": 0, "num_shards": 5}):
        assert Artifact(folder, config(tmp_path, **flags)).is_done()


def test_processes_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.quick.shared.artifacts.test_sharding import config, work\n"
        "flags = {'shard_index': sys.argv[2], 'num_shards': 4}\n"
        "work(config(Path(sys.argv[1]), **flags), seconds_an_item=0.02)\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(index)], cwd=ROOT)
        for index in range(4)
    ]
    assert [process.wait(timeout=200) for process in started] == [0] * 4
    folder = tmp_path / "run" / "dump"
    assert (folder / MANIFEST).exists()
    for index in range(NUM_ITEMS):
        assert (folder / f"item-{index}").read_text() == f"{index}\n"


def test_one_share_is_held_by_one_process(tmp_path: Path) -> None:
    whole, first, second = (
        Artifact(tmp_path / "run" / "dump", config(tmp_path, **flags))
        for flags in (
            {},
            {"shard_index": 0, "num_shards": 2},
            {"shard_index": 1, "num_shards": 2},
        )
    )
    with first.work(), second.work():
        for other in (whole, first):
            with pytest.raises(RetryableError, match="another process"), other.work():
                pass
    with whole.work(), pytest.raises(RetryableError, match="another process"), first.work():
        pass


def test_overwrite_replaces_another_configuration_once(tmp_path: Path) -> None:
    work(config(tmp_path))
    folder = tmp_path / "run" / "dump"
    new = {"flavour": "salted", "num_shards": 2}
    with pytest.raises(UserError, match="flavour: was 'plain', now 'salted'"):
        work(config(tmp_path, **new, shard_index=0))
    work(config(tmp_path, **new, shard_index=0, overwrite=True))
    assert sorted(path.name for path in folder.glob("item-*")) == [
        f"item-{i}" for i in (0, 2, 4, 6)
    ]
    work(config(tmp_path, **new, shard_index=1, overwrite=True))
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest["identity"]["dump.flavour"] == "salted"
    assert all((folder / f"item-{index}").read_text() == f"{index}\n" for index in range(NUM_ITEMS))


def test_overwrite_waits_for_those_at_work_on_the_other_configuration(tmp_path: Path) -> None:
    old = Artifact(
        tmp_path / "run" / "dump", config(tmp_path, flavour="old", num_shards=2, shard_index=0)
    )
    new = config(tmp_path, overwrite=True, num_shards=2, shard_index=1)
    with old.work():
        with pytest.raises(RetryableError, match="another process"):
            work(new)
        assert json.loads((old.folder / "identity.json").read_text())["dump.flavour"] == "old"


def test_a_share_of_a_killed_overwrite_clears_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(config(tmp_path))
    folder = tmp_path / "run" / "dump"
    new = {"flavour": "salted", "num_shards": 2, "shard_index": 0}
    with monkeypatch.context() as patch:
        killed_at(patch, "item-")
        with pytest.raises(KeyboardInterrupt):
            work(config(tmp_path, **new, overwrite=True))
    assert len(list(folder.glob("item-*"))) == NUM_ITEMS
    with pytest.raises(UserError, match="flavour: was 'plain', now 'salted'"):
        work(config(tmp_path, **new))
    work(config(tmp_path, **new, overwrite=True))
    assert sorted(path.name for path in folder.glob("item-*")) == [
        f"item-{i}" for i in (0, 2, 4, 6)
    ]


def test_shares_of_another_count_wait_for_those_at_work(tmp_path: Path) -> None:
    of_four, of_eight = (
        Artifact(tmp_path / "run" / "dump", config(tmp_path, num_shards=count, shard_index=2))
        for count in (4, 8)
    )
    for at_work, other in ((of_four, of_eight), (of_eight, of_four)):
        with at_work.work(), pytest.raises(RetryableError, match="another process"), other.work():
            pass
        with other.work():  # what is left of the lock's file is nobody's
            pass


def test_share_worked_example() -> None:
    assert [item for item in range(7) if Share(1, 3).owns(item)] == [1, 4]


def test_the_index_may_come_from_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INDEX_VARIABLE, "2")
    found = config(tmp_path, num_shards=3)
    assert (found.share, found.process_name) == (Share(2, 3), "dump-2")
    assert config(tmp_path, num_shards=3, shard_index=1).share == Share(1, 3)
    # A job of several whose recipe does not say so would do everything several times over.
    with pytest.raises(UserError, match="needs num_shards of at least 3, found 1"):
        config(tmp_path)
    monkeypatch.setenv(INDEX_VARIABLE, "two")
    with pytest.raises(UserError, match="expected a number from 0, found 'two'"):
        config(tmp_path, num_shards=3)
    monkeypatch.delenv(INDEX_VARIABLE)
    with pytest.raises(UserError, match="give --shard_index"):
        config(tmp_path, num_shards=3)


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match="has no locks"), lock(tmp_path / ".lock"):
        pass
