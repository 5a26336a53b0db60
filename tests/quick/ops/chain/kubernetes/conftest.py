# SPDX-License-Identifier: Apache-2.0
"""The cluster that the tests of `--by kubernetes` begin with."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from shared.runtime import process
from stages.ops.chain.kubernetes import jobs
from tests.quick.ops.chain.kubernetes.cluster import (
    KUBECTL,
    POLL_S,
    RECIPE,
    WITHIN_S,
    Cluster,
    a_job,
    an_object,
)


@pytest.fixture
def cluster(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Cluster]:
    def too_long(*_: object) -> None:
        raise TimeoutError(f"the command has not ended within {WITHIN_S} s")

    monkeypatch.setattr(jobs, "_POLL_S", POLL_S)
    monkeypatch.setattr(process, "catch_stop_signals", lambda: None)  # pytest's own are kept
    monkeypatch.setenv("CLUSTER", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    caplog.set_level("INFO")
    before = signal.signal(signal.SIGALRM, too_long)
    for name in ("bin", "objects"):
        (tmp_path / name).mkdir()
    # Not by way of `python3` on the search path, which may be a manager's script and slower than all else.
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.write_text(f"#!{sys.executable} -IS\n{KUBECTL.read_text()}")
    kubectl.chmod(0o755)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    config = an_object("ConfigMap", "recipe-abc", "recipe", data={"recipe.yaml": RECIPE})
    objects = [config, *(a_job(stage) for stage in ("synth", "dump", "train", "bench"))]
    (tmp_path / "rendered.yaml").write_text(yaml.safe_dump_all(objects))
    yield Cluster(tmp_path, caplog, capsys)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
