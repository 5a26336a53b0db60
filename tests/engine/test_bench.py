# SPDX-License-Identifier: Apache-2.0
"""bench on real engines: a missed gate, and a head that is not this target's."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared import files
from tests.engine.conftest import ROOT, Demo

pytestmark = pytest.mark.engine


def bench(demo: Demo, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    lines = (demo.target / "held_out.jsonl").read_text().splitlines()[:8]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "stages.bench", "--workspace", str(tmp_path)]
    command += ["--target", str(demo.target), "--prompts", "prompts.jsonl", "--max_tokens", "32"]
    return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture
def export(demo: Demo, tmp_path: Path) -> Path:
    """A finished export in a run of its own; its parent's settings are this target's path."""
    folder = tmp_path / "run" / "export"
    shutil.copytree(demo.export, folder)
    manifest = files.read_json(folder / "manifest.json")
    identity = manifest["identity"] | {"run.target": str(demo.target)}
    identity["run.max_length_tokens"] = 2048
    files.write_json(folder / "manifest.json", {**manifest, "identity": identity})
    return folder


def test_a_missed_gate_is_exit_3_with_its_report(demo: Demo, export: Path, tmp_path: Path) -> None:
    done = bench(demo, tmp_path, "--min_acceptance_length", "3.99")
    assert done.returncode == 3, done.stderr[-2000:]
    report = json.loads((tmp_path / "run" / "bench" / "report.json").read_text())
    length = report["head"]["acceptance"]["acceptance_length"]
    assert (
        f"acceptance length {length:.3f} is {3.99 - length:.3f} under the gate 3.99" in done.stderr
    )
    assert not (tmp_path / "run" / "bench" / "manifest.json").exists()
    assert report["baseline"]["requests"] == report["head"]["requests"] == 8
    assert "Traceback" not in done.stderr


def test_a_head_of_another_target_is_exit_2(demo: Demo, export: Path, tmp_path: Path) -> None:
    config = export / "config.json"
    values = files.read_json(config) | {"vocab_size": 2048}
    config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    manifest = files.read_json(export / "manifest.json")
    manifest["files"]["config.json"]["bytes"] = config.stat().st_size
    files.write_json(export / "manifest.json", manifest)
    done = bench(demo, tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "expected a head for" in done.stderr
    assert not (tmp_path / "run" / "bench" / "report.json").exists()
