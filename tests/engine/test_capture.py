# SPDX-License-Identifier: Apache-2.0
"""Are the captured states the target's own? Real vLLM against transformers, on random targets.

Each check of agreement stands beside a planted fault that it must catch: ids one off, a norm too
many or too few. Costs about four engine starts: a minute and a half on two cores.
"""

import dataclasses
import functools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPT2LMHeadModel

from shared import target as targets
from shared.config import build
from shared.errors import EyrieError, OutputError, RetryableError, UserError
from stages.dump import checks, connector, spool
from stages.dump.backend_hf import HfCapture
from stages.dump.backend_vllm import VllmCapture, _Asked, _token_logprobs
from stages.dump.backends import Row, choose
from stages.dump.config import DumpConfig
from stages.dump.engine_start import starting
from stages.dump.vllm_setup import check_version
from tests.models import (
    VOCAB_SIZE,
    tiny_llama,
    tiny_moe,
    tiny_qwen3,
    tiny_scaled_rotary,
    tiny_sliding,
    tiny_tokenizer,
)

pytestmark = pytest.mark.engine

VLLM = Version(vllm.__version__)
AUX_LAYERS = (2, 4, 5)
NUM_LAYERS = 8
# The targets' own limit too: the longest row has no position to spare.
MAX_LENGTH_TOKENS = 256
# Measured between the engines: 0.5 % at id 2, growing to 1.2 % at id L, all of it bf16 rounding.
TOLERANCE = 0.02
# Rows that are asked for their log-probabilities: one token, one chunk, three chunks of 96.
PROBES = (0, 4, 7)
LENGTHS = (1, 2, 5, 17, 64, 130, 200, 256, 99, 3, 255, 31)


def make_rows(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def settings(target: Path, aux_layers: tuple[int, ...] = AUX_LAYERS) -> dict[str, Any]:
    return {
        "target": target,
        "aux_layers": aux_layers,
        "num_layers": NUM_LAYERS,
        "max_length_tokens": MAX_LENGTH_TOKENS,
    }


def capture_hf(target: Path, aux_layers: tuple[int, ...] = AUX_LAYERS) -> dict[int, torch.Tensor]:
    with HfCapture(**settings(target, aux_layers), max_num_batched_tokens=600) as capture:
        return answers(capture)[0]


def answers(capture: Any) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """row -> states, and row -> log-probabilities of the rows of `PROBES`, as `capture` says."""
    states, logprobs = {}, {}
    for captured in capture.run([Row(ids, i in PROBES) for i, ids in enumerate(make_rows())]):
        states[captured.row] = captured.states.clone()
        if captured.logprobs is not None:
            logprobs[captured.row] = captured.logprobs
    return states, logprobs


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    found, expected = found.float(), expected.float()
    return ((found - expected).norm() / expected.norm()).item()


def token_errors(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[T]: the same for each token."""
    found, expected = found.float(), expected.float()
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def assert_agree(
    found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor], *, routed: bool = False
) -> None:
    """Row by row and slot by slot, within the tolerance.

    At a near tie a router sends a token to other experts, and bf16's rounding decides: where tokens
    are `routed`, most of them must agree, as `dump parity` asks it.
    """
    assert sorted(found) == sorted(expected) == list(range(len(LENGTHS)))
    if routed:
        for slot in range(len(AUX_LAYERS) + 1):
            gaps = torch.cat([token_errors(found[i][:, slot], expected[i][:, slot]) for i in found])
            assert gaps.median() < TOLERANCE, f"slot {slot}: {gaps.median():.4f}"
            far = float((gaps > 5 * TOLERANCE).float().mean())
            assert far < 0.1, f"slot {slot}: {far:.1%} of tokens are far off"
        return
    for index, states in expected.items():
        assert found[index].shape == states.shape
        assert found[index].dtype == torch.bfloat16
        for slot in range(states.shape[1]):
            gap = error(found[index][:, slot], states[:, slot])
            assert gap < TOLERANCE, f"row {index} slot {slot}: {gap:.4f}"


@dataclasses.dataclass
class Captured:
    target: Path
    vllm: dict[int, torch.Tensor]
    hf: dict[int, torch.Tensor]
    logprobs: dict[int, torch.Tensor]  # by vLLM
    routed: bool


TARGETS: dict[str, Callable[..., Path]] = {
    "llama-tied": functools.partial(tiny_llama, tied=True),
    "qwen3": tiny_qwen3,
    "sliding-window": tiny_sliding,
    "moe": tiny_moe,
    "scaled-rotary": tiny_scaled_rotary,
}


@pytest.fixture(scope="module", params=list(TARGETS))
def captured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Captured]:
    """The same rows through both engines. vLLM prefills in chunks of 96, several rows a step."""
    if (
        request.param == "sliding-window"
        and Version("0.30") > VLLM
        and not torch.cuda.is_available()
    ):
        pytest.skip("the CPU kernel of vLLM 0.28 refuses pages of 16 tokens; dump says: backend hf")
    target = tmp_path_factory.mktemp(request.param)
    TARGETS[request.param](target, max_length_tokens=MAX_LENGTH_TOKENS)
    parent = tmp_path_factory.mktemp("spool")
    with VllmCapture(**settings(target), max_num_batched_tokens=96, spool=parent) as capture:
        # A run broken off after its first result must leave nothing behind in the next one.
        for _ in capture.run([Row(ids) for ids in make_rows(seed=1)]):
            break
        states, logprobs = answers(capture)
        (folder,) = parent.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert not [path for path in folder.iterdir() if path.suffix == spool.STATES_SUFFIX]
    assert not list(parent.iterdir())
    yield Captured(target, states, capture_hf(target), logprobs, request.param == "moe")


def test_engines_agree(captured: Captured) -> None:
    assert_agree(captured.vllm, captured.hf, routed=captured.routed)


def test_ids_one_off_are_caught(captured: Captured) -> None:
    for shifted in ((1, 3, 4), (3, 5, 6)):
        wrong = capture_hf(captured.target, shifted)
        for index, states in captured.vllm.items():
            for slot in range(len(AUX_LAYERS)):
                assert error(states[:, slot], wrong[index][:, slot]) > 5 * TOLERANCE
    wrong = capture_hf(captured.target, (5, 6, NUM_LAYERS - 1))
    for index, states in captured.vllm.items():
        assert error(states[:, -1], wrong[index][:, -2]) > 5 * TOLERANCE


def test_rebuilt_log_probabilities_are_the_engines_own(captured: Captured) -> None:
    """What dump asks of its probe rows, with dump's own tolerance of 0.1 nats."""
    config = targets.read_config(captured.target)
    tensors = targets.read_tensors(config)
    assert set(captured.logprobs) == set(PROBES)
    for index, told in captured.logprobs.items():
        ids = torch.tensor(make_rows()[index])
        assert told.shape == (len(ids) - 1,)
        if not told.numel():
            continue
        final = captured.vllm[index][:-1, -1]
        rebuilt = checks.token_logprobs(checks.logits(final, config, tensors), ids[1:])
        assert float((rebuilt - told).abs().mean()) < 0.05
        # Planted: the norm left out, and the state of another layer.
        for wrong in (
            checks.head_logits(final, config, tensors),
            checks.logits(captured.vllm[index][:-1, -2], config, tensors),
        ):
            assert float((checks.token_logprobs(wrong, ids[1:]) - told).abs().mean()) > 0.3


@torch.inference_mode()
def test_both_backends_say_the_same_log_probabilities(captured: Captured) -> None:
    with HfCapture(**settings(captured.target)) as capture:
        _, hf = answers(capture)
    for index, told in captured.logprobs.items():
        gaps = (told - hf[index]).abs()
        assert gaps.numel() == 0 or gaps.median() < 0.1
        assert captured.routed or not bool((gaps > 0.3).any())


@torch.inference_mode()
def test_final_state_gives_the_targets_logits(captured: Captured) -> None:
    model = AutoModelForCausalLM.from_pretrained(captured.target, dtype=torch.bfloat16)
    agreed, total, gaps = 0, 0, []
    for index, row in enumerate(make_rows()):
        answer = model(torch.tensor([row]), output_hidden_states=True)
        final = captured.vllm[index][:, -1]
        logits = model.lm_head(model.model.norm(final))
        assert captured.routed or error(logits, answer.logits[0]) < TOLERANCE
        gaps.append(token_errors(logits, answer.logits[0]))
        agreed += int((logits.argmax(-1) == answer.logits[0].argmax(-1)).sum())
        total += len(row)
        # The planted faults: no norm at all, and the norm twice (HF's last entry has had it).
        assert error(model.lm_head(final), answer.logits[0]) > 5 * TOLERANCE
        twice = model.lm_head(model.model.norm(answer.hidden_states[-1][0]))
        assert error(twice, answer.logits[0]) > 5 * TOLERANCE
    assert torch.cat(gaps).median() < TOLERANCE
    assert agreed / total > (0.9 if captured.routed else 0.97)


@torch.inference_mode()
def test_hf_takes_the_states_that_transformers_itself_reports(captured: Captured) -> None:
    """By the median token: a router's near tie, tipped by the batch's shape, moves single ones."""
    model = AutoModelForCausalLM.from_pretrained(captured.target, dtype=torch.bfloat16)
    for index, row in enumerate(make_rows()):
        reported = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        normed = model.model.norm(captured.hf[index][:, -1])
        pairs = [(captured.hf[index][:, s], reported[i][0]) for s, i in enumerate(AUX_LAYERS)]
        for found, expected in [*pairs, (normed, reported[NUM_LAYERS][0])]:
            assert token_errors(found, expected).median() < TOLERANCE
            assert captured.routed or error(found, expected) < TOLERANCE


def test_hf_finds_its_way_in_an_older_model(tmp_path: Path) -> None:
    shape = {"vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": NUM_LAYERS, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path)
    assert capture_hf(tmp_path)[3].shape == (LENGTHS[3], len(AUX_LAYERS) + 1, 64)


def test_engine_in_this_process_captures_too(tmp_path: Path) -> None:
    """Without a process of its own the engine moves, and hands over files, only when stepped."""
    program = (
        "import sys\n"
        "from safetensors.torch import save_file\n"
        "from stages.dump.backend_vllm import VllmCapture\n"
        "from tests.engine.test_capture import answers, settings\n"
        "with VllmCapture(**settings(sys.argv[1]), max_num_batched_tokens=96) as capture:\n"
        "    states = {str(index): states for index, states in answers(capture)[0].items()}\n"
        "save_file(states, sys.argv[2])\n"
    )
    target = tiny_llama(tmp_path / "target", max_length_tokens=MAX_LENGTH_TOKENS)
    found = tmp_path / "states.safetensors"
    subprocess.run(
        [sys.executable, "-c", program, str(target), str(found)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=Path(__file__).parents[2],
        check=True,
        timeout=300,
    )
    states = {int(index): states for index, states in load_file(found).items()}
    assert_agree(states, capture_hf(target))


def test_dead_engine_is_retryable_and_leaves_no_spool(tmp_path: Path) -> None:
    target = tiny_llama(tmp_path / "target", max_length_tokens=MAX_LENGTH_TOKENS)
    spool = tmp_path / "spool"
    with (
        pytest.raises(RetryableError, match="the vLLM engine died"),
        VllmCapture(**settings(target), max_num_batched_tokens=256, spool=spool) as capture,
    ):
        (core,) = (p for p in multiprocessing.active_children() if "EngineCore" in p.name)
        results = capture.run([Row(ids) for ids in make_rows((200,) * 400)])
        next(results)
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
        process = multiprocessing.get_context("fork").Process(target=_leave, args=(code,))
        process.start()
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
        pytest.raises(RetryableError, match="ended by a signal"),
        VllmCapture(**settings(target)),
    ):
        pass
    killer.join()


def _kill_engine_core() -> None:
    for _ in range(3000):  # importing vLLM on a busy machine takes a while
        for process in multiprocessing.active_children():
            if "EngineCore" in process.name:
                time.sleep(0.5)
                process.kill()
                return
        time.sleep(0.05)


def test_a_start_that_the_engine_itself_refuses_is_the_users(tmp_path: Path) -> None:
    target = tiny_llama(tmp_path / "target", max_length_tokens=MAX_LENGTH_TOKENS)
    damaged = load_file(target / "model.safetensors")
    damaged["model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    save_file(damaged, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="could not start"), VllmCapture(**settings(target)):
        pass


@pytest.mark.parametrize("found", ["0.27.1", "0.33.0", "1.0"])
def test_version_never_tried_is_refused(found: str) -> None:
    with pytest.raises(UserError, match=rf">=0\.28,<0\.33, found vLLM {found}"):
        check_version(found)


@pytest.mark.parametrize("found", ["0.28.0", "0.32.0+cpu", "0.32.1", "0.31.0.post2"])
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


# The connector's and the reader's parts by themselves.


def test_token_logprobs_worked_example() -> None:
    """ids [7, 8, 9]: vLLM's list is [None, {8: -1.5}, {9: -0.3}]."""
    told = [
        None,
        {8: SimpleNamespace(logprob=-1.5), 3: SimpleNamespace(logprob=-0.1)},
        {9: SimpleNamespace(logprob=-0.3)},
    ]
    assert _token_logprobs([7, 8, 9], told).tolist() == pytest.approx([-1.5, -0.3])
    assert _token_logprobs([7], [None]).shape == (0,)


def cache_and_request(tmp_path: Path) -> tuple[torch.Tensor, connector.Finished]:
    """Pages of 16 tokens for 2 layers of 4 numbers; a request of 18 tokens in pages 7 and 3."""
    cache = torch.arange(10 * 2 * 16 * 4, dtype=torch.float32).view(10, 2, 16, 4) + 1
    if Version("0.30") > VLLM:  # its pages are [token, layer, number]
        cache = cache.transpose(1, 2)
    path = tmp_path / "00000000.safetensors"
    request = connector.Finished("r", str(path), list(range(18)), [7, 3])
    return cache.clone(memory_format=torch.contiguous_format), request


def test_pages_are_read_in_order_and_zeroed(tmp_path: Path) -> None:
    cache, request = cache_and_request(tmp_path)
    before = cache.clone()
    states = connector._take(cache, request, 16)
    pages = before if Version("0.30") > VLLM else before.transpose(1, 2)
    expected = torch.cat([pages[7], pages[3][:2]])
    assert torch.equal(states, expected.to(torch.bfloat16))
    others = [0, 1, 2, 4, 5, 6, 8, 9]
    assert torch.equal(cache[others], before[others])
    assert not cache[[7, 3]].any()


def reader(tmp_path: Path) -> VllmCapture:
    """A capture whose engine was never started: enough to read a file."""
    capture = VllmCapture(**settings(tmp_path))
    capture._spool = tmp_path
    return capture


def test_pages_never_written_are_refused(tmp_path: Path) -> None:
    cache, request = cache_and_request(tmp_path)
    connector._take(cache, request, 16)
    connector._write(request, connector._take(cache, request, 16), None)
    (path,) = reader(tmp_path)._ready_files()
    with pytest.raises(OutputError, match="18 of 18 tokens have no final hidden state"):
        reader(tmp_path)._read(path, _Asked(0, request.token_ids, False))


def test_states_of_another_row_are_refused(tmp_path: Path) -> None:
    cache, request = cache_and_request(tmp_path)
    connector._write(request, connector._take(cache, request, 16), None)
    (path,) = reader(tmp_path)._ready_files()
    assert reader(tmp_path)._read(path, _Asked(0, request.token_ids, False)).shape == (18, 2, 4)
    with pytest.raises(OutputError, match=r"row 0: .* other tokens"):
        reader(tmp_path)._read(path, _Asked(0, [1, *request.token_ids[1:]], False))


def test_file_that_cannot_be_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(connector, "save_file", full)
    cache, request = cache_and_request(tmp_path)
    connector._write(request, connector._take(cache, request, 16), None)
    with pytest.raises(UserError, match="could not write hidden states"):
        reader(tmp_path)._ready_files()


def test_half_a_file_is_not_taken_for_one(tmp_path: Path) -> None:
    save_file({"token_ids": torch.zeros(1)}, tmp_path / "00000000.partial")
    assert reader(tmp_path)._ready_files() == []


def test_spool_goes_where_there_is_room(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="MiB free"),
        spool.open_spool([tmp_path], needed_bytes=1 << 60),
    ):
        pass
    with spool.open_spool([tmp_path], needed_bytes=1) as folder:
        assert folder.parent == tmp_path


def test_shared_memory_of_another_user_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod's volume over /dev/shm may belong to root."""

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(spool.tempfile, "mkdtemp", refuse)
    with (
        pytest.raises(UserError, match=f"could not write to {tmp_path} as user"),
        spool.open_spool([tmp_path], needed_bytes=1),
    ):
        pass


def test_only_abandoned_spools_are_removed(tmp_path: Path) -> None:
    abandoned = tmp_path / f"{spool.SPOOL_PREFIX}killed"
    abandoned.mkdir()
    with spool.open_spool([tmp_path], needed_bytes=1) as held:
        for folder in (abandoned, held):
            os.utime(folder, (time.time() - 3600,) * 2)
        with spool.open_spool([tmp_path], needed_bytes=1) as fresh:
            assert sorted(tmp_path.iterdir()) == sorted([held, fresh])
