# SPDX-License-Identifier: Apache-2.0
"""A hub that is out of reach, cuts its answers or talks nonsense: an exit code and a reason, no traceback."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shared.errors import UserError
from shared.settings import build
from shared.target.model import locate
from stages.train.commands import ExportConfig
from tests.conftest import ROOT
from tests.quick.ops.chain.recipes import CONFIG

COMMIT = "c0ffee" + "0" * 34
CLOSED = "http://127.0.0.1:9"
BODY = json.dumps(CONFIG).encode()
# What the hub says of a model, by its organisation.
FACTS = {"words": b"<html>Sign in</html>", "list": b"[]", "number": b'{"id": 1, "siblings": 7}'}
# The client waits for seconds between its retries: this process does not.
RUN = """
import runpy, sys, time
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))
runpy.run_module(f"stages.{sys.argv.pop(1)}", run_name="__main__", alter_sys=True)
"""
PUSH = """
import pathlib, time
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01))
from shared.cli import _log, _outcome
from stages.train.export.hub import push
try:
    push(pathlib.Path("export"), "someorg/name")
except Exception as error:
    _log(_outcome(error))
    raise SystemExit(_outcome(error).exit_code)
"""


class _Handler(BaseHTTPRequestHandler):
    """Every model has a config.json; `cut/...` ends in its middle, and of the others FACTS are told."""

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        organisation = self.path.removeprefix("/api/models").split("/")[1]
        is_file = self.path.endswith("/config.json")
        body = BODY if is_file else FACTS.get(organisation, b"{")
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:9] if organisation == "cut" else body)

    do_HEAD = do_POST = do_GET  # noqa: N815


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A hub's cache with the config.json of someorg/x, and nothing else."""
    model = tmp_path / "hf" / "hub" / "models--someorg--x"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    (model / "snapshots" / COMMIT).mkdir(parents=True)
    (model / "snapshots" / COMMIT / "config.json").write_bytes(BODY)
    return tmp_path


def told(folder: Path, endpoint: str, code: str, *arguments: str) -> tuple[int, str]:
    """(exit code, what it says) of a process whose hub is at `endpoint`."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "PYTHONPATH": str(ROOT),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said[-3000:]
    return done.returncode, said


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_config_alone_in_the_cache_does_not_hide_that_there_is_no_network(
    cached: Path, flags: tuple[str, ...]
) -> None:
    code, said = told(cached, CLOSED, RUN, "ops", "plan", "someorg/x", *flags)
    assert (code, "[hub-unreachable]" in said) == (75, True), said


def test_nor_in_a_dry_run(cached: Path) -> None:
    (cached / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    recipe = "run: {target: someorg/x}\nsynth: {prompts: prompts.jsonl}\ndump: {backend: hf}\n"
    (cached / "recipe.yaml").write_text(recipe)
    chain = ("ops", "run", "--dry_run", "--recipe", "recipe.yaml", "--workspace", ".")
    code, said = told(cached, CLOSED, RUN, *chain)
    assert (code, "[hub-unreachable]" in said, "│ synth │ to do" in said) == (75, True, True), said
    two = recipe.replace("someorg/x", "someorg/x, target_train: someorg/y")
    (cached / "recipe.yaml").write_text(two)
    code, said = told(cached, CLOSED, RUN, *chain)
    unreached = [f"run.target: someorg/{name} is no folder here" in said for name in "xy"]
    assert (code, *unreached) == (75, True, True), said
    recipe = recipe.replace("prompts.jsonl", "gone.jsonl")  # which no network mends
    (cached / "recipe.yaml").write_text(recipe)
    code, said = told(cached, CLOSED, RUN, *chain)
    assert (code, "the hub could not be reached (ConnectError" in said) == (2, True), said


PLAN, FETCH = ("ops", "plan"), ("demo", "real-target", "out", "--model")


@pytest.mark.parametrize(
    ("command", "model", "error", "words"),
    [
        (PLAN, "cut/z", "hub-unreachable", "RemoteProtocolError"),
        (PLAN, "words/z", "hub-answer", "SafetensorsParsingError"),
        (FETCH, "words/z", "hub-answer", "JSONDecodeError"),
        (FETCH, "list/z", "hub-answer", "TypeError"),
        (FETCH, "number/z", "hub-answer", "TypeError"),
    ],
)
def test_a_cut_or_malformed_answer_is_told(
    tmp_path: Path, endpoint: str, command: tuple[str, ...], model: str, error: str, words: str
) -> None:
    code, said = told(tmp_path, endpoint, RUN, *command, model)
    assert (code, f"[{error}]" in said, words in said) == (75, True, True), said
    assert not (tmp_path / "out").exists()


def test_a_cache_that_cannot_be_written_is_the_machine_s_fault(
    tmp_path: Path, endpoint: str
) -> None:
    (tmp_path / "hf").write_text("no folder")
    code, said = told(tmp_path, endpoint, RUN, "ops", "plan", "words/z")
    assert (code, "[hub-cache]" in said) == (2, True), said


def test_a_head_that_is_nowhere_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--head: expected a draft head's folder") as refused:
        locate("nosuch", tmp_path, revision=None, label="--head", is_head=True)
    assert refused.value.code == "head-not-found"


@pytest.mark.parametrize("place", [CLOSED, "loopback"])
def test_an_upload_that_fails_may_be_tried_again(tmp_path: Path, endpoint: str, place: str) -> None:
    (tmp_path / "export").mkdir()
    code, said = told(tmp_path, endpoint if place == "loopback" else place, PUSH)
    assert (code, "[push-failed]" in said) == (75, True), said


@pytest.mark.parametrize("name", ["notanid", "a/b/c", "org/a..b", "org/-x", "org/"])
def test_a_repository_s_name_is_checked_before_the_export_is_made(name: str) -> None:
    with pytest.raises(UserError, match="push_to") as refused:
        build(ExportConfig, {"target": "t", "push_to": name})
    assert refused.value.code == "setting-invalid"
    assert build(ExportConfig, {"target": "t", "push_to": "org/a.b"}).push_to == "org/a.b"
