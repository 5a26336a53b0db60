# SPDX-License-Identifier: Apache-2.0
"""What a server of ours is started with, seen from a process that is started in its place."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shared.vllm import server
from shared.vllm.cpu import ONE_PROCESS_EXECUTOR

PROBE = """
import json, os, pathlib, sys
found = {"flags": sys.argv[1:], "environment": dict(os.environ)}
pathlib.Path(os.environ["PROBE_OUT"]).write_text(json.dumps(found))
"""


@pytest.fixture
def probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the process says what it found."""
    (tmp_path / "probe.py").write_text(PROBE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PROBE_OUT", str(tmp_path / "found.json"))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(server, "_MODULE", "probe")
    return tmp_path / "found.json"


def started(probed: Path, options: Mapping[str, Any], **environment: str) -> dict[str, Any]:
    with server.start_server(options, environment) as child:
        deadline = time.monotonic() + 60
        while child.exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert child.exit_code() == 0
    return dict(json.loads(probed.read_text()))


def test_a_cache_of_one_gib_is_what_a_cpu_gets_unasked(probed: Path) -> None:
    assert started(probed, {})["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
    found = started(probed, {}, VLLM_CPU_KVCACHE_SPACE="4")
    assert found["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "4"


def test_a_cache_that_was_asked_for_is_not_overruled(
    probed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM on a CPU takes the variable where both are there, and says nothing."""
    found = started(probed, {"kv-cache-memory-bytes": 400_000})
    assert "VLLM_CPU_KVCACHE_SPACE" not in found["environment"]
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    found = started(probed, {"kv-cache-memory-bytes": 400_000})
    assert "VLLM_CPU_KVCACHE_SPACE" not in found["environment"]
    place = found["flags"].index("--kv-cache-memory-bytes")
    assert found["flags"][place + 1] == "400000"


@pytest.mark.parametrize(
    ("visible", "is_eager"), [(None, False), ("1,0", False), ("", True), ("-1", True)]
)
def test_a_server_that_sees_no_gpu_compiles_nothing(
    probed: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, is_eager: bool
) -> None:
    """What preflight advises beside a GPU where torch is for the processor."""
    monkeypatch.setattr(server, "_ACCELERATORS", (probed.parent,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    chosen = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert ("--enforce-eager" in started(probed, {}, **chosen)["flags"]) is is_eager
    monkeypatch.setattr(server, "_ACCELERATORS", (probed.parent / "none",))
    assert "--enforce-eager" in started(probed, {}, **chosen)["flags"]


def test_an_engine_of_one_rank_on_a_cpu_is_one_process(
    probed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def executor(**options: Any) -> str | None:
        flags = started(probed, {name.replace("_", "-"): value for name, value in options.items()})
        words = flags["flags"]
        name = "--distributed-executor-backend"
        return words[words.index(name) + 1] if name in words else None

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    for name in ("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(server, "_ACCELERATORS", (probed.parent / "none",))
    assert executor() == executor(tensor_parallel_size=1) == ONE_PROCESS_EXECUTOR
    assert executor(tensor_parallel_size=2) is executor(pipeline_parallel_size=2) is None
    assert executor(distributed_executor_backend="mp") == "mp"
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # the operator chose vLLM's own binding
    assert executor() is None
    monkeypatch.delenv("VLLM_CPU_NUM_OF_RESERVED_CPU")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert executor() is None
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert started(probed, {})["environment"]["OMP_NUM_THREADS"] == "2"
    assert started(probed, {}, OMP_NUM_THREADS="3")["environment"]["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(server, "_ACCELERATORS", (probed.parent,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert executor() is None


def test_options_become_words_that_vllm_parses() -> None:
    """`--enforce-eager true` it does not, nor a list as JSON."""
    options = {
        "enforce-eager": True,
        "async-scheduling": False,
        "seed": None,
        "max-num-seqs": 8,
        "cudagraph-capture-sizes": [1, 8],
        "compilation-config": {"level": 3},
        "lora-modules": [{"name": "a"}],
    }
    assert server.flags(options) == [
        "--enforce-eager",
        "--no-async-scheduling",
        *("--max-num-seqs", "8"),
        *("--cudagraph-capture-sizes", "1", "8"),
        *("--compilation-config", '{"level": 3}'),
        *("--lora-modules", '{"name": "a"}'),
    ]


def test_the_key_is_in_no_process_list(probed: Path) -> None:
    found = started(probed, {"enable-log-requests": True, "max-model-len": None})
    key = found["environment"]["VLLM_API_KEY"]
    assert len(key) >= 32
    assert key not in " ".join(found["flags"])
    assert found["flags"][found["flags"].index("--host") + 1] == "127.0.0.1"
    assert "--enable-log-requests" in found["flags"]
    assert "--max-model-len" not in found["flags"]


def test_a_start_is_told_and_its_end_too(
    probed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(server.ChildServer, "is_healthy", lambda _: True)
    with server.start_server({"model": "models/small"}) as child:
        assert "starting the vLLM server for models/small: usually about a minute" in caplog.text
        child.wait_until_ready(stage="bench", timeout_s=60)
    assert re.search(r"the server is ready after \d+ s", caplog.text)


SLOW_TO_END = """
import os, pathlib, signal, sys, time
out = pathlib.Path(os.environ["PROBE_OUT"])
def end(*_):
    time.sleep(float(os.environ["ENDS_AFTER_S"]))
    out.write_text("ended by itself")
    sys.exit()
signal.signal(signal.SIGTERM, end)
begun = out.with_suffix(".begun")
begun.write_text("is there")
begun.rename(out)  # whole, as soon as it is there
time.sleep(120)
"""


@pytest.mark.parametrize(
    ("is_ready", "ends_after_s", "left"),
    [(True, "2", "ended by itself"), (False, "30", "is there")],
)
def test_only_a_server_that_was_ready_is_given_time_to_end(
    probed: Path, monkeypatch: pytest.MonkeyPatch, is_ready: bool, ends_after_s: str, left: str
) -> None:
    """vLLM's own, while it loads, takes more than 20 s to heed a signal."""
    (probed.parent / "probe.py").write_text(SLOW_TO_END)
    monkeypatch.setenv("ENDS_AFTER_S", ends_after_s)
    monkeypatch.setattr(server.ChildServer, "is_healthy", lambda _: is_ready)
    with server.start_server({}) as child:
        deadline = time.monotonic() + 60
        while not probed.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        if is_ready:
            child.wait_until_ready(stage="bench", timeout_s=60)
    assert probed.read_text() == left
    assert child.exit_code() is not None
