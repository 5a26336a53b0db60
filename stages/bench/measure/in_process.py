# SPDX-License-Identifier: Apache-2.0
"""One engine after another, each in a process of its own: none inherits memory or caches."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import RetryableError, UserError
from shared.io import files
from shared.runtime.process import die_with_parent, end_group, stop_if_requested

_GRACE_S = 20.0


def measure(
    name: str, plan: Mapping[str, Any], folder: Path, *, timeout_s: float
) -> dict[str, Any]:
    """Run one engine in a process of its own; its raw measurement.

    Raises:
        UserError: the engine refused the head or a setting.
        RetryableError: it died or took too long.
    """
    plan_path, out_path = folder / "raw" / f"{name}.plan.json", folder / "raw" / f"{name}.json"
    files.write_json(plan_path, plan)
    out_path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "stages.bench.measure.engine", str(plan_path), str(out_path)]
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=die_with_parent
    )
    code = _wait(process, timeout_s)
    found = files.read_json(out_path) if out_path.exists() else {}
    if error := found.get("error"):
        kind = UserError if error["kind"] == "user" else RetryableError
        raise kind(f"measuring {name}: {error['message']}")
    if code != 0 or not found:
        raise RetryableError(
            f"measuring {name}: the engine's process ended with code {code} and left no result. "
            "The log above says why; run the same command again, or give it more memory."
        )
    return dict(found)


def _wait(process: "subprocess.Popen[bytes]", timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                stop_if_requested("a measurement is only kept whole")
                if time.monotonic() > deadline:
                    raise RetryableError(
                        f"an engine did not finish in {timeout_s:.0f} s (bench.engine_timeout_s)."
                    ) from None
    finally:
        end_group(process, grace_s=_GRACE_S)
