# SPDX-License-Identifier: Apache-2.0
"""The quarter tier of `make real`, as its user runs it: a pretrained target, its prompts, the chain."""

import json
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, ops, real_target

pytestmark = [pytest.mark.engine, pytest.mark.soak]

RECIPE = ROOT / "compose" / "recipes" / "smollm2" / "quarter.yaml"
LIMIT_S = 40 * 60  # on slow cores


def test_a_pretrained_target_gains_more_than_ngram_in_time(tmp_path: Path) -> None:
    started_s = time.monotonic()
    assert real_target(tmp_path, tmp_path / "targets" / "smollm2-quarter").returncode == 0
    done = ops(tmp_path, "run", "--recipe", str(RECIPE))
    assert done.returncode == 0
    assert time.monotonic() - started_s < LIMIT_S
    report = json.loads((tmp_path / "smollm2-quarter" / "bench" / "report.json").read_text())
    assert report["head"]["tokens_per_step"] > report["ngram"]["tokens_per_step"]
    lossless = report["lossless"]
    assert lossless["compared"] == lossless["identical"] + lossless["ties"] > 0
    last = done.stdout.splitlines()[-1]
    length = report["head"]["acceptance"]["acceptance_length"]
    assert last.startswith(f"smollm2-quarter: acceptance_length={length:.2f} head=")
    assert (tmp_path / "smollm2-quarter" / "bench" / "report.html").exists()
