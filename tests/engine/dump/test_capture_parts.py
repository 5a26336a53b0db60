# SPDX-License-Identifier: Apache-2.0
"""The connector's, the reader's and the spool's parts by themselves: no engine is started."""

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from packaging.version import Version
from safetensors.torch import save_file

from shared.errors import OutputError, UserError
from shared.vllm.cpu import ONE_PROCESS_EXECUTOR
from stages.dump.backends import spool
from stages.dump.backends.stats import measure
from stages.dump.backends.vllm import connector
from stages.dump.backends.vllm.capture import VllmCapture, _Pending, _token_logprobs
from stages.dump.backends.vllm.pages import PageReader
from stages.dump.backends.vllm.setup import VllmSettings, prepare_environment
from tests.engine.dump.capturing import MAX_LENGTH_TOKENS, settings
from tests.models import tiny_llama

pytestmark = pytest.mark.engine

VLLM = Version(vllm.__version__)


def test_an_engine_of_one_rank_on_a_cpu_has_no_process_for_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM itself makes "mp" of "uni" there."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    target = tiny_llama(tmp_path / "target", max_length_tokens=MAX_LENGTH_TOKENS)

    def executor(**more: Any) -> Any:
        config = VllmSettings(**settings(target), max_num_batched_tokens=512, **more).resolve()
        return config.parallel_config.distributed_executor_backend

    assert executor() == ONE_PROCESS_EXECUTOR
    assert executor(engine_args={"distributed_executor_backend": "mp"}) == "mp"
    assert executor(engine_args={"distributed_executor_backend": "uni"}) == "mp"


def test_what_vllm_has_not_implemented_is_refused_by_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    target = tiny_llama(tmp_path / "target", max_length_tokens=MAX_LENGTH_TOKENS)
    asked = VllmSettings(
        **settings(target), max_num_batched_tokens=512, engine_args={"pipeline_parallel_size": 2}
    )
    with pytest.raises(UserError, match="Pipeline parallelism is not supported"):
        asked.resolve()


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


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5, 16, 18])
def test_pages_are_read_in_order_and_zeroed(tmp_path: Path, chunk_tokens: int | None) -> None:
    cache, request = cache_and_request(tmp_path)
    before = cache.clone()
    states = PageReader(cache, 16, chunk_tokens=chunk_tokens).take(request.block_ids, 18).states
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
    taken = [PageReader(cache, 16).take(request.block_ids, 18) for _ in range(2)]
    connector._write(request, taken[1])
    (path,) = reader(tmp_path)._ready_files()
    with pytest.raises(OutputError, match="18 of 18 tokens have no final hidden state"):
        reader(tmp_path)._read(path, _Pending(0, request.token_ids, False))


def test_states_of_another_row_are_refused(tmp_path: Path) -> None:
    cache, request = cache_and_request(tmp_path)
    connector._write(request, PageReader(cache, 16).take(request.block_ids, 18))
    (path,) = reader(tmp_path)._ready_files()
    states, stats = reader(tmp_path)._read(path, _Pending(0, request.token_ids, False))
    assert states.shape == (18, 2, 4)
    for stored, expected in zip(stats, measure(states), strict=True):
        assert torch.equal(stored, expected)
    with pytest.raises(OutputError, match=r"row 0: .* other tokens"):
        reader(tmp_path)._read(path, _Pending(0, [1, *request.token_ids[1:]], False))


def test_file_that_cannot_be_written_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(connector, "save_file", full)
    cache, request = cache_and_request(tmp_path)
    connector._write(request, PageReader(cache, 16).take(request.block_ids, 18))
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


def test_shared_memory_has_room_for_every_engine_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four engines that start together each see all of /dev/shm free."""
    monkeypatch.setattr(spool, "SHM", tmp_path / "shm")
    monkeypatch.setattr(spool, "SHM_RESERVE_BYTES", 0)
    (tmp_path / "shm").mkdir()
    free = shutil.disk_usage(tmp_path).free
    parents = [tmp_path / "shm", tmp_path / "disk"]
    for sharers, parent in ((1, "shm"), (4, "disk")):
        with spool.open_spool(parents, needed_bytes=free // 3, sharers=sharers) as folder:
            assert folder.parent.name == parent


def test_the_environment_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:True")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    prepare_environment()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_unknown_engine_options_are_refused_with_the_nearest(tmp_path: Path) -> None:
    capture = VllmCapture(**settings(tmp_path), engine_args={"gpu_memory_utilisation": 0.5})
    with pytest.raises(UserError, match="gpu_memory_utilization") as raised:
        capture.resolve()
    assert raised.value.code == "engine-args-unknown"


def test_engine_options_reach_the_engine(tmp_path: Path) -> None:
    target = tiny_llama(tmp_path / "target", max_length_tokens=MAX_LENGTH_TOKENS)
    capture = VllmCapture(**settings(target), engine_args={"max_num_seqs": 3})
    assert capture.resolve().scheduler_config.max_num_seqs == 3


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
