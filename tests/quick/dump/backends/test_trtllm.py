# SPDX-License-Identifier: Apache-2.0
"""Capture with TensorRT-LLM, on a stand-in that behaves as its source does (`tests/stand_ins`)."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from shared.errors import EyrieError, OutputError, RetryableError, UserError
from shared.settings import build
from shared.target import model as targets
from stages.dump.backends.base import Row
from stages.dump.backends.choose import open_backend
from stages.dump.backends.hf import HfCapture
from stages.dump.config import DumpConfig
from stages.ops.chain.preflight import packages
from stages.ops.chain.processes import Step
from tests.engine.dump.capturing import AUX_LAYERS, MAX_LENGTH_TOKENS, make_rows, settings
from tests.models import tiny_llama, tiny_qwen3
from tests.quick.ops.chain.recipes import CPU

STAND_INS = Path(__file__).resolve().parents[3] / "stand_ins"
SHORT = make_rows((17, 64, 3))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in, with nothing wrong yet."""
    monkeypatch.syspath_prepend(STAND_INS)
    yield importlib.import_module("tensorrt_llm")
    for name in [n for n in sys.modules if n.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]
    for name in ("capture", "setup"):
        sys.modules.pop(f"stages.dump.backends.trtllm.{name}", None)


@pytest.fixture
def backend(engine: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = importlib.import_module("stages.dump.backends.trtllm.capture")
    monkeypatch.setattr(module, "FILE_TIMEOUT_S", 10.0)
    return module


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target") / "llama"
    return tiny_llama(path, max_length_tokens=MAX_LENGTH_TOKENS)


def capture(
    backend: ModuleType, target: Path, tmp_path: Path, rows: list[list[int]] = SHORT, **given: Any
) -> dict[int, torch.Tensor]:
    made = {**settings(target), "spool": tmp_path / "spool", **given}
    with backend.TrtllmCapture(**made) as capturing:
        return {c.row: c.states.clone() for c in capturing.run([Row(ids, True) for ids in rows])}


def by_transformers(target: Path, rows: list[list[int]], **given: Any) -> dict[int, torch.Tensor]:
    # A batch of one row at a time, as the stand-in computes them: the same to the bit.
    wanted = {**settings(target), **given, "dtype": "bfloat16"}
    with HfCapture(**wanted, max_num_batched_tokens=1) as hf:
        return {c.row: c.states.clone() for c in hf.run(map(Row, rows))}


@pytest.mark.parametrize("aux_layers", [AUX_LAYERS, (1,), (3, 7)])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
def test_states_are_those_of_transformers(
    backend: ModuleType, tmp_path: Path, make: Any, aux_layers: tuple[int, ...]
) -> None:
    """Ids, their order and the final state before the norm, for rows of all lengths."""
    target = make(tmp_path / "target", max_length_tokens=MAX_LENGTH_TOKENS)
    rows = make_rows()
    found = capture(backend, target, tmp_path, rows, aux_layers=aux_layers)
    expected = by_transformers(target, rows, aux_layers=aux_layers)
    assert list(found) == list(range(len(rows)))
    for row in found:
        assert found[row].dtype == torch.bfloat16
        assert torch.equal(found[row], expected[row]), row


def test_ids_are_those_of_outputs(backend: ModuleType) -> None:
    """The worked example; -1 would be the normed state, and the embedding leaves no layer."""
    to_capture = sys.modules["stages.dump.backends.trtllm.setup"].layers_to_capture
    assert to_capture((2, 4, 5), 8) == [1, 3, 4, 7]
    with pytest.raises(UserError, match=r"expected ids of 1 or more .* found \[0, 2\]"):
        to_capture((0, 2), 8)


def test_rows_never_share_a_step_nor_a_prefix(
    backend: ModuleType, engine: ModuleType, target: Path, tmp_path: Path
) -> None:
    """Also where the engine would let them: what is asked for keeps them apart."""
    engine.faults.forces_one_a_step = False
    (row,) = make_rows((200,))
    rows = [row, row, row[:150], [*row[:100], *row[:100]]]
    found = capture(backend, target, tmp_path, rows)
    expected = by_transformers(target, rows)
    assert all(torch.equal(found[i], expected[i]) for i in range(len(rows)))
    (made,) = engine.engines
    assert set(made.steps) == {1}
    assert made.args.max_batch_size == 1
    assert not made.args.enable_chunked_prefill
    assert not made.args.kv_cache_config.enable_block_reuse


def test_nothing_is_left(
    backend: ModuleType, engine: ModuleType, target: Path, tmp_path: Path
) -> None:
    with backend.TrtllmCapture(**settings(target), spool=tmp_path) as capturing:
        (spool,) = tmp_path.iterdir()
        assert spool.stat().st_mode & 0o777 == 0o700
        for _ in capturing.run(map(Row, SHORT)):
            assert len(list(spool.iterdir())) <= 1  # the next row's, if it is fast
        assert not list(spool.iterdir())
    assert engine.engines[0].is_shut
    assert not list(tmp_path.iterdir())


def test_a_run_broken_off_does_not_disturb_the_next(
    backend: ModuleType, target: Path, tmp_path: Path
) -> None:
    with backend.TrtllmCapture(**settings(target), spool=tmp_path) as capturing:
        broken = capturing.run(map(Row, SHORT))
        next(broken)
        broken.close()
        again = [Row(ids) for ids in reversed(SHORT)]
        found = {c.row: c.states.clone() for c in capturing.run(again)}
    expected = by_transformers(target, [*reversed(SHORT)])
    assert all(torch.equal(found[row], expected[row]) for row in expected)


def test_half_a_file_is_waited_for(backend: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "data_1.pt"
    torch.save([{"input_ids": torch.arange(9)}], path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) - 30):
        path.write_bytes(whole[:size])
        assert backend._load(path) is None, size
    path.write_bytes(whole)
    (entry,) = backend._load(path)
    assert entry["input_ids"].tolist() == list(range(9))


def test_no_log_probabilities_is_told_once(
    backend: ModuleType, target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with backend.TrtllmCapture(**settings(target), spool=tmp_path) as capturing:
        assert all(c.logprobs is None for c in capturing.run([Row(ids, True) for ids in SHORT]))
    assert caplog.text.count("reports no log-probabilities") == 1


FIRST = 3  # after the two rows of the start
WRONG: list[tuple[dict[str, Any], type[EyrieError], str]] = [
    ({"dies_at": FIRST + 1}, RetryableError, "engine died .*Executor worker died"),
    ({"dies_at": FIRST + 1, "says_so": False}, RetryableError, "no hidden states for 1 s"),
    ({"dies_at": 1}, RetryableError, "engine died"),
    ({"keeps_files": True}, RetryableError, "no hidden states for 1 s, for row 0"),
    ({"other_ids": True}, OutputError, "hidden states of other tokens"),
    ({"has_hooks": False}, UserError, r"hidden states of llama .*no hooks.*backend: hf"),
    ({"refuses": ValueError("Unknown architecture: X")}, UserError, "Unknown architecture: X"),
    ({"refuses": RuntimeError("Executor worker returned error")}, UserError, "backend: hf"),
    ({"refuses": RuntimeError("died during initialization")}, RetryableError, "A signal ended"),
]


@pytest.mark.parametrize(("wrong", "kind", "told"), WRONG, ids=lambda value: str(value)[:40])
def test_what_goes_wrong_is_told(
    backend: ModuleType,
    engine: ModuleType,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: dict[str, Any],
    kind: type[EyrieError],
    told: str,
) -> None:
    monkeypatch.setattr(backend, "FILE_TIMEOUT_S", 1.0)
    for name, value in wrong.items():
        setattr(engine.faults, name, value)
    with pytest.raises(EyrieError, match=told) as raised:
        capture(backend, target, tmp_path)
    assert type(raised.value) is kind
    assert not list((tmp_path / "spool").iterdir())


def test_files_of_other_columns_are_refused(
    backend: ModuleType, engine: ModuleType, target: Path, tmp_path: Path
) -> None:
    def save(self: Any, ids: list[int]) -> None:
        entry = {"input_ids": torch.tensor(ids), "hidden_state": self._buffer[: len(ids), :64]}
        torch.save([entry], Path(self.args.speculative_config.output_directory) / "data_1.pt")

    engine.LLM._save = save
    with pytest.raises(OutputError, match=r"expected aux_hidden_states \[4, \d+\].*found None"):
        capture(backend, target, tmp_path)


def test_another_target_is_refused(backend: ModuleType, target: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected 9 layers, found 8"):
        capture(backend, target, tmp_path, num_layers=9)


@pytest.mark.parametrize("found", ["1.1.0", "1.4.0", "0.21.0"])
def test_version_never_read_is_refused(
    backend: ModuleType, engine: ModuleType, target: Path, tmp_path: Path, found: str
) -> None:
    engine.__version__ = found
    with pytest.raises(UserError, match=rf">=1\.2,<1\.4, found TensorRT-LLM {found}"):
        capture(backend, target, tmp_path)
    assert not engine.engines


@pytest.mark.parametrize("found", ["1.2.0rc2", "1.2.1", "1.3.0rc27"])
def test_version_read_is_taken(backend: ModuleType, found: str) -> None:
    backend.check_version(found)


def opened(target: Path, tmp_path: Path, **flags: Any) -> Any:
    given = {"workspace": tmp_path, "target": target, "backend": "trtllm", **flags}
    config = build(DumpConfig, {name: str(value) for name, value in given.items()})
    return open_backend(config.backend, config, targets.read_config(target), AUX_LAYERS)


def test_the_recipe_reaches_the_engine(
    engine: ModuleType, target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    flags = {"tensor_parallel_size": 4, "expert_parallel_size": 2, "max_length_tokens": 100}
    with opened(target, tmp_path, **flags) as trtllm:
        assert f"starting backend trtllm for {target}: usually about a minute" in caplog.text
        assert len(list(trtllm.run(map(Row, SHORT)))) == len(SHORT)
    (made,) = engine.engines
    assert made.args.tensor_parallel_size == 4
    assert made.args.moe_expert_parallel_size == 2
    assert made.args.max_seq_len == made.args.max_num_tokens == 102


def test_without_the_package_it_is_said_what_to_do(target: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"TensorRT-LLM, which is not installed here.*BASE_IMAGE"),
        opened(target, tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            {"backend": "vllm", "tensor_parallel_size": 2},
            "needs backend: trtllm .*, found backend: vllm",
        ),
        (
            {"backend": "auto", "tensor_parallel_size": 2},
            "needs backend: trtllm .*, found backend: auto",
        ),
        ({"tensor_parallel_size": 3}, "must divide tensor_parallel_size, found 2 and 3"),
    ],
)
def test_experts_are_dealt_out_by_this_backend_alone(
    target: Path, tmp_path: Path, flags: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        opened(target, tmp_path, expert_parallel_size=2, **flags)


def test_a_look_ahead_asks_for_this_engine_and_not_for_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = {"pyarrow": "25.0", "torch": "2.9.1"}
    monkeypatch.setattr(packages, "installed", lambda python: installed)
    step = Step("dump", {"backend": "trtllm"}, False)
    (told,) = packages.package_problems(step, CPU)
    assert "expected tensorrt-llm >=1.2,<1.4" in told
    installed["tensorrt_llm"] = "1.3.0rc14"
    assert not list(packages.package_problems(step, CPU))
