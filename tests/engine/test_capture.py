# SPDX-License-Identifier: Apache-2.0
"""Are the captured states the target's own? Real vLLM against transformers, on random targets.

Each check of agreement stands beside a planted fault that it must catch: ids one off, a norm too
many or too few. Costs about four engine starts: a minute and a half on two cores.
"""

import dataclasses
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPT2LMHeadModel

from shared.errors import OutputError, RetryableError, UserError
from stages.dump import connector
from stages.dump.engine_hf import HfCapture
from stages.dump.engine_vllm import VllmCapture, check_version
from tests.models import VOCAB_SIZE, tiny_llama, tiny_qwen3, tiny_tokenizer

pytestmark = pytest.mark.engine

AUX_LAYERS = (2, 4, 5)
NUM_LAYERS = 8
# The targets' own limit too: the longest row has no position to spare.
MAX_LENGTH_TOKENS = 256
# Measured between the engines: 0.5 % at id 2, growing to 1.2 % at id L, all of it bf16 rounding.
TOLERANCE = 0.02
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
        return dict(capture.run(make_rows()))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    found, expected = found.float(), expected.float()
    return ((found - expected).norm() / expected.norm()).item()


def assert_agree(found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> None:
    """Row by row and slot by slot, within the tolerance."""
    assert sorted(found) == sorted(expected) == list(range(len(LENGTHS)))
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


@pytest.fixture(scope="module", params=["llama-tied", "qwen3"])
def captured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Captured]:
    """The same rows through both engines. vLLM prefills in chunks of 96, several rows a step."""
    target = tmp_path_factory.mktemp(request.param)
    if request.param == "llama-tied":
        tiny_llama(target, tied=True, max_length_tokens=MAX_LENGTH_TOKENS)
    else:
        tiny_qwen3(target, max_length_tokens=MAX_LENGTH_TOKENS)
    spool = tmp_path_factory.mktemp("spool")
    with VllmCapture(**settings(target), max_num_batched_tokens=96, spool=spool) as capture:
        # A run broken off after its first result must leave nothing behind in the next one.
        for _ in capture.run(make_rows(seed=1)):
            break
        vllm = dict(capture.run(make_rows()))
        (folder,) = spool.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert not [path for path in folder.iterdir() if path.suffix == connector.STATES_SUFFIX]
    assert not list(spool.iterdir())
    yield Captured(target, vllm, capture_hf(target))


def test_engines_agree(captured: Captured) -> None:
    assert_agree(captured.vllm, captured.hf)


def test_ids_one_off_are_caught(captured: Captured) -> None:
    for shifted in ((1, 3, 4), (3, 5, 6)):
        wrong = capture_hf(captured.target, shifted)
        for index, states in captured.vllm.items():
            for slot in range(len(AUX_LAYERS)):
                assert error(states[:, slot], wrong[index][:, slot]) > 5 * TOLERANCE
    wrong = capture_hf(captured.target, (5, 6, NUM_LAYERS - 1))
    for index, states in captured.vllm.items():
        assert error(states[:, -1], wrong[index][:, -2]) > 5 * TOLERANCE


@torch.inference_mode()
def test_final_state_gives_the_targets_logits(captured: Captured) -> None:
    model = AutoModelForCausalLM.from_pretrained(captured.target, dtype=torch.bfloat16)
    agreed, total = 0, 0
    for index, row in enumerate(make_rows()):
        answer = model(torch.tensor([row]), output_hidden_states=True)
        final = captured.vllm[index][:, -1]
        logits = model.lm_head(model.model.norm(final))
        assert error(logits, answer.logits[0]) < TOLERANCE
        agreed += int((logits.argmax(-1) == answer.logits[0].argmax(-1)).sum())
        total += len(row)
        # The planted faults: no norm at all, and the norm twice (HF's last entry has had it).
        assert error(model.lm_head(final), answer.logits[0]) > 5 * TOLERANCE
        twice = model.lm_head(model.model.norm(answer.hidden_states[-1][0]))
        assert error(twice, answer.logits[0]) > 5 * TOLERANCE
    assert agreed / total > 0.97


@torch.inference_mode()
def test_hf_takes_the_states_that_transformers_itself_reports(captured: Captured) -> None:
    model = AutoModelForCausalLM.from_pretrained(captured.target, dtype=torch.bfloat16)
    for index, row in enumerate(make_rows()):
        reported = model(torch.tensor([row]), output_hidden_states=True).hidden_states
        for slot, layer in enumerate(AUX_LAYERS):
            assert error(captured.hf[index][:, slot], reported[layer][0]) < TOLERANCE
        normed = model.model.norm(captured.hf[index][:, -1])
        assert error(normed, reported[NUM_LAYERS][0]) < TOLERANCE


def test_hf_finds_its_way_in_an_older_model(tmp_path: Path) -> None:
    shape = {"vocab_size": VOCAB_SIZE, "n_embd": 64, "n_layer": NUM_LAYERS, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path)
    assert capture_hf(tmp_path)[3].shape == (LENGTHS[3], len(AUX_LAYERS) + 1, 64)


def test_engine_in_this_process_captures_too(tmp_path: Path) -> None:
    """Without a process of its own the engine moves, and hands over files, only when stepped."""
    program = (
        "import sys\n"
        "from safetensors.torch import save_file\n"
        "from stages.dump.engine_vllm import VllmCapture\n"
        "from tests.engine.test_capture import make_rows, settings\n"
        "with VllmCapture(**settings(sys.argv[1]), max_num_batched_tokens=96) as capture:\n"
        "    states = {str(index): states for index, states in capture.run(make_rows())}\n"
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
        results = capture.run(make_rows((200,) * 400))
        next(results)
        # Without a chance to say anything, as the kernel does when memory is out.
        core.kill()
        list(results)
    assert not list(spool.iterdir())


@pytest.mark.parametrize("found", ["0.27.1", "0.33.0", "1.0"])
def test_version_never_tried_is_refused(found: str) -> None:
    with pytest.raises(UserError, match=rf">=0\.28,<0\.33, found vLLM {found}"):
        check_version(found)


@pytest.mark.parametrize("found", ["0.28.0", "0.32.0+cpu", "0.32.1", "0.31.0.post2"])
def test_supported_version_is_taken(found: str) -> None:
    check_version(found)


def test_target_without_hooks_is_sent_to_the_other_engine(tmp_path: Path) -> None:
    config = Gemma2Config(num_hidden_layers=NUM_LAYERS, architectures=["Gemma2ForCausalLM"])
    config.save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path)
    refused = pytest.raises(UserError, match=r"Gemma2ForCausalLM.*engine: hf")
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
            list(capture.run([[1, 2], row]))


# The connector's and the reader's parts by themselves.


def cache_and_request(tmp_path: Path) -> tuple[torch.Tensor, connector.Finished]:
    """Pages of 16 tokens for 2 layers of 4 numbers; a request of 18 tokens in pages 7 and 3."""
    cache = torch.arange(10 * 2 * 16 * 4, dtype=torch.float32).view(10, 2, 16, 4) + 1
    path = tmp_path / "00000000.safetensors"
    request = connector.Finished("r", str(path), list(range(18)), [7, 3])
    return cache.clone(), request


def test_pages_are_read_in_order_and_zeroed(tmp_path: Path) -> None:
    cache, request = cache_and_request(tmp_path)
    before = cache.clone()
    states = connector._take(cache, request, 16)
    expected = torch.cat([before[7].transpose(0, 1), before[3].transpose(0, 1)[:2]])
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
        reader(tmp_path)._read(path, 0, request.token_ids)


def test_states_of_another_row_are_refused(tmp_path: Path) -> None:
    cache, request = cache_and_request(tmp_path)
    connector._write(request, connector._take(cache, request, 16), None)
    (path,) = reader(tmp_path)._ready_files()
    assert reader(tmp_path)._read(path, 0, request.token_ids).shape == (18, 2, 4)
    with pytest.raises(OutputError, match=r"row 0: .* other tokens"):
        reader(tmp_path)._read(path, 0, [1, *request.token_ids[1:]])


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
        connector.open_spool([tmp_path], needed_bytes=1 << 60),
    ):
        pass
    with connector.open_spool([tmp_path], needed_bytes=1) as spool:
        assert spool.parent == tmp_path


def test_only_abandoned_spools_are_removed(tmp_path: Path) -> None:
    abandoned = tmp_path / f"{connector.SPOOL_PREFIX}killed"
    abandoned.mkdir()
    with connector.open_spool([tmp_path], needed_bytes=1) as held:
        for folder in (abandoned, held):
            os.utime(folder, (time.time() - 3600,) * 2)
        with connector.open_spool([tmp_path], needed_bytes=1) as fresh:
            assert sorted(tmp_path.iterdir()) == sorted([held, fresh])
