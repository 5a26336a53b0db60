# SPDX-License-Identifier: Apache-2.0
"""Captures that cannot be: engines that die or will not start, targets and rows that are refused.

Costs a few engine starts, most of which come to nothing.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config

from shared.errors import EyrieError, RetryableError, Stopped, UserError
from shared.runtime import process
from shared.settings import build
from shared.target import model as targets
from stages.dump.backends.base import Row
from stages.dump.backends.choose import choose
from stages.dump.backends.hf import HfCapture
from stages.dump.backends.vllm.capture import VllmCapture
from stages.dump.backends.vllm.setup import check_version
from stages.dump.backends.vllm.start import starting
from stages.dump.config import DumpConfig
from tests.engine.dump.capturing import (
    AUX_LAYERS,
    MAX_LENGTH_TOKENS,
    NUM_LAYERS,
    make_rows,
    settings,
)
from tests.models import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("is_asked_to_stop", "outcome", "message"),
    [
        (False, RetryableError, "the vLLM engine died"),
        # Ctrl-C ends the engine too, often before it has handed over another row.
        (True, Stopped, "stopped by a signal; every whole shard is saved"),
    ],
)
def test_dead_engine_is_retryable_and_leaves_no_spool(
    is_asked_to_stop: bool,
    outcome: type[EyrieError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "_stop", threading.Event())
    target = tiny_llama(tmp_path / "target", max_length_tokens=MAX_LENGTH_TOKENS)
    spool = tmp_path / "spool"
    with (
        pytest.raises(outcome, match=message),
        VllmCapture(**settings(target), max_num_batched_tokens=256, spool=spool) as capture,
    ):
        (core,) = (p for p in multiprocessing.active_children() if "EngineCore" in p.name)
        results = capture.run([Row(ids) for ids in make_rows((200,) * 400)])
        next(results)
        if is_asked_to_stop:
            process._stop.set()
        # Without a chance to say anything, as the kernel does when memory is out.
        core.kill()
        list(results)
    assert not list(spool.iterdir())


@pytest.mark.parametrize(
    ("told", "code", "kind"),
    [
        ("{'EngineCore_DP0': -9}", 0, RetryableError),
        ("{'EngineCore_DP0': 1}", 0, UserError),
        ("{'EngineCore_DP0': 1, 'EngineCore_DP1': -15}", 0, UserError),
        ("{}", -signal.SIGKILL, RetryableError),
        ("{}", 1, UserError),
    ],
)
def test_a_killed_start_is_told_from_a_refused_one(
    told: str, code: int, kind: type[Exception]
) -> None:
    with pytest.raises(EyrieError) as raised, starting("tiny"):
        left = multiprocessing.get_context("fork").Process(target=_leave, args=(code,))
        left.start()
        time.sleep(0.3)  # as an engine's process, it is there for a while
        raise RuntimeError(f"Engine core initialization failed. Failed core proc(s): {told}")
    assert type(raised.value) is kind


def _leave(code: int) -> None:
    time.sleep(0.5)
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def test_an_engine_killed_while_it_starts_is_retryable(tmp_path: Path) -> None:
    target = tiny_llama(tmp_path / "target", max_length_tokens=MAX_LENGTH_TOKENS)
    killer = threading.Thread(target=_kill_engine_core)
    killer.start()
    with (
        pytest.raises(RetryableError, match="A signal ended"),
        VllmCapture(**settings(target)),
    ):
        pass
    killer.join()


def _kill_engine_core() -> None:
    for _ in range(3000):  # importing vLLM on a busy machine takes a while
        for child in multiprocessing.active_children():
            if "EngineCore" in child.name and child.pid is not None:
                os.kill(child.pid, signal.SIGSTOP)  # else it might be ready before it is killed
                time.sleep(0.5)
                child.kill()
                return
        time.sleep(0.05)


def test_a_start_that_the_engine_itself_refuses_is_the_users(tmp_path: Path) -> None:
    target = tiny_llama(tmp_path / "target", max_length_tokens=MAX_LENGTH_TOKENS)
    damaged = load_file(target / "model.safetensors")
    damaged["model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    save_file(damaged, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="could not start"), VllmCapture(**settings(target)):
        pass


@pytest.mark.parametrize("found", ["0.27.1", "0.34.0", "1.0"])
def test_version_never_tried_is_refused(found: str) -> None:
    with pytest.raises(UserError, match=rf">=0\.28,<0\.34, found vLLM {found}"):
        check_version(found)


@pytest.mark.parametrize("found", ["0.28.0", "0.33.0", "0.32.0+cpu", "0.32.1", "0.31.0.post2"])
def test_supported_version_is_taken(found: str) -> None:
    check_version(found)


def test_auto_asks_the_engine_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = tiny_llama(tmp_path / "llama", max_length_tokens=MAX_LENGTH_TOKENS)
    assert choose_for(folder) == "vllm"
    folder = tmp_path / "gemma"
    config = Gemma2Config(num_hidden_layers=NUM_LAYERS, architectures=["Gemma2ForCausalLM"])
    config.save_pretrained(folder)
    tiny_tokenizer(folder)
    assert choose_for(folder) == "hf"
    assert "Gemma2ForCausalLM" in caplog.text
    assert "its model has no hooks" in caplog.text


def choose_for(folder: Path) -> str:
    flags = {"target": str(folder), "max_length_tokens": str(MAX_LENGTH_TOKENS), "backend": "auto"}
    return choose(build(DumpConfig, flags), targets.read_config(folder), AUX_LAYERS)


def test_target_without_hooks_is_sent_to_the_other_engine(tmp_path: Path) -> None:
    config = Gemma2Config(num_hidden_layers=NUM_LAYERS, architectures=["Gemma2ForCausalLM"])
    config.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    refused = pytest.raises(UserError, match=r"Gemma2ForCausalLM.*backend: hf")
    with refused, VllmCapture(**settings(tmp_path)):
        pass


@pytest.mark.parametrize("engine", [HfCapture, VllmCapture])
def test_another_number_of_layers_is_refused(tmp_path: Path, engine: Any) -> None:
    target = tiny_llama(tmp_path, num_layers=9)
    with (
        pytest.raises(UserError, match="expected 8 layers, found 9"),
        engine(**settings(target)),
    ):
        pass


@pytest.mark.parametrize("row", [[], [5] * (MAX_LENGTH_TOKENS + 1)])
def test_row_of_no_or_too_many_tokens_is_refused(tmp_path: Path, row: list[int]) -> None:
    with HfCapture(**settings(tiny_llama(tmp_path))) as capture:
        refused = pytest.raises(UserError, match=rf"row 1: .* found {len(row)}")
        with refused:
            list(capture.run([Row([1, 2]), Row(row)]))
