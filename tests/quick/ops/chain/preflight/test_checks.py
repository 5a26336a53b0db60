# SPDX-License-Identifier: Apache-2.0
"""What stands in a chain's way is named before its first stage."""

import functools
import http.server
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.paths import RunPaths
from shared.runtime import compiler
from stages.ops.chain import containers
from stages.ops.chain.machine import Machine
from stages.ops.chain.preflight import checks, packages
from stages.ops.chain.rows import Looks
from tests.quick.ops.chain.recipes import CPU, GIB, KEPT, problems, steps
from tests.quick.shared.conversations.gallery import FOLDER, tokenizer_of


def test_torch_for_a_processor_beside_a_gpu_is_refused(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = Machine((("Toy", GIB),), 64 * GIB, GIB)
    found = problems(steps(workspace), workspace, roomy)
    assert [line.split("'")[0] for line in found] == ["synth", "dump", "train", "bench"]
    assert "expected torch for CUDA beside 1 GPU, found 2.13.0+cpu. Run `make clean" in found[0]
    served = {"synth": KEPT, "dump": {"backend": "hf"}}
    found = problems(steps(workspace, served), workspace, roomy)
    assert [line.split("'")[0] for line in found] == ["dump", "train", "bench"]


@pytest.mark.usefixtures("cuda_torch")
def test_a_gpu_s_kernels_need_a_compiler_and_python_s_headers(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    roomy = Machine((("Toy", GIB),), 64 * GIB, GIB)
    python = tmp_path / "python"  # bench has an interpreter of its own, with headers
    (tmp_path / "Python.h").touch()
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *metadata*) echo "{{}}";; *) echo {tmp_path};; esac\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("EYRIE_BENCH_PYTHON", str(python))
    assert compiler_lines(workspace, roomy) == []
    packages.include_folder.cache_clear()
    (tmp_path / "include.py").write_text("print('/nowhere')")
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "include.py"))
    (line,) = compiler_lines(workspace, roomy)
    assert line.startswith("synth and train: expected a C compiler and Python's headers,")
    assert line.endswith(
        "found no /nowhere/Python.h. Install both (Debian and Ubuntu: apt-get "
        "install gcc python3-dev)."
    )
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    first, second = compiler_lines(workspace, roomy)
    assert "found no C compiler and no /nowhere/Python.h." in first
    assert second.startswith("bench: ") and "found no C compiler. " in second
    assert compiler_lines(workspace, Machine((), 64 * GIB, GIB)) == []
    packages.include_folder.cache_clear()


def compiler_lines(workspace: Path, machine: Machine) -> list[str]:
    return [line for line in problems(steps(workspace), workspace, machine) if "compiler" in line]


def test_too_little_shared_memory_is_named(workspace: Path) -> None:
    assert problems(steps(workspace), workspace) == []
    little = Machine((), 64 * GIB, 64 << 20)
    (shm,) = problems(steps(workspace), workspace, little)
    assert shm.startswith("/dev/shm: expected 160 MiB free for vLLM, found 64 MiB. Give")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a server that has /health, and no /v1/health."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "health").touch()
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "site")
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("path", ["/v1", "/v1/"])
def test_an_endpoint_is_asked_for_its_health_as_its_stage_takes_it(
    workspace: Path, address: str, path: str
) -> None:
    url = address + path
    changes: dict[str, Any] = {"synth": {"endpoints": [url]}, "bench": {"endpoint": url}}
    assert problems(steps(workspace, changes), workspace) == []
    changes["bench"]["baseline_endpoint"] = "http://127.0.0.1:9"
    (found,) = problems(steps(workspace, changes), workspace)
    assert "a server at http://127.0.0.1:9, found" in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"synth": {"prompts": "none.jsonl"}}, "synth.prompts: expected a file"),
        ({"bench": {"prompts": "none.jsonl"}}, "bench.prompts: expected a file"),
        ({"dump": {"states": "nowhere"}}, "dump.states: expected a folder at .*/nowhere"),
        ({"synth": {"endpoints": ["http://127.0.0.1:9"]}}, "a server at http://127.0.0.1:9, found"),
        ({"run": {"chat_template_kwargs": {"enable": 1}}}, "found enable, which it does not read"),
    ],
)
def test_a_recipe_that_cannot_work_is_named(
    workspace: Path, changes: dict[str, dict[str, Any]], message: str
) -> None:
    (found,) = problems(steps(workspace, changes), workspace)
    assert re.search(message, found)


def test_what_holds_for_several_stages_is_said_once(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "problems", lambda _: [])
    misspelt, paths = {"run": {"chat_template_kwargs": {"enable": 1}}}, RunPaths(workspace, "run")
    for look_for in (checks.problems, checks.problems_of_containers):
        (line,) = look_for(steps(workspace, misspelt), paths, CPU, Looks(workspace))
        assert "found enable, which it does not read" in line


def test_reasoning_that_would_be_trained_on_is_named(workspace: Path) -> None:
    tokenizer_of(FOLDER / "seed-oss.jinja").save_pretrained(workspace / "model")
    dropped = {"run": {"reasoning": "drop"}}
    (found,) = problems(steps(workspace, dropped), workspace)
    assert "synth.reasoning_end: expected what ends the reasoning" in found
    assert problems(steps(workspace, {**dropped, "synth": KEPT}), workspace) == []
    ends = {"synth": {"reasoning_end": "</seed:think>"}}
    assert problems(steps(workspace, dropped | ends), workspace) == []


def test_other_packages_than_a_stage_needs_are_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = steps(workspace)
    monkeypatch.setitem(packages.FLOORS, "train", {"torch": ">=99", "no-such-package": ">=1"})
    monkeypatch.setenv("EYRIE_BENCH_PYTHON", "/nowhere/python")
    torch, missing, python = problems(whole, workspace)
    assert "train's packages: expected torch >=99, found 2." in torch
    assert "expected no-such-package >=1, found none" in missing
    assert "bench: expected a Python interpreter at /nowhere/python" in python


@pytest.mark.parametrize(
    ("tracker", "distribution"),
    [("wandb", "wandb"), ("tensorboard", "tensorboardX"), ("mlflow", "mlflow-skinny")],
)
def test_a_tracker_that_train_has_no_package_of_is_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, distribution: str
) -> None:
    found = packages.installed(sys.executable)
    installed = {name: found[name] for name in found if not name.startswith(tracker)}
    monkeypatch.setattr(packages, "installed", lambda _: installed)
    chosen = {"train": {"trackers": [tracker]}}
    (told,) = problems(steps(workspace, chosen), workspace)
    assert f"train.trackers: expected trackers that are installed for {sys.executable}" in told
    assert f"found no {tracker}. Leave {tracker} out" in told
    installed[distribution] = "1.0"
    assert problems(steps(workspace, chosen), workspace) == []


def test_drafts_further_than_the_head_is_trained_are_told_and_no_obstacle(workspace: Path) -> None:
    further: dict[str, Any] = {"bench": {"num_speculative_tokens": [2, 5]}}
    (told,) = checks.warnings(steps(workspace, further))
    assert "num_speculative_tokens: 5 drafts further than train.ttt_steps: 3 trains" in told
    assert problems(steps(workspace, further), workspace) == []
    for other in (
        {"bench": {"num_speculative_tokens": 3}},
        further | {"train": {"ttt_steps": 5}},
        {"bench": further["bench"] | {"head": "model"}},
        {"bench": {"num_speculative_tokens": 5, "endpoint": "http://127.0.0.1:9"}},
    ):
        assert list(checks.warnings(steps(workspace, other))) == []
