# SPDX-License-Identifier: Apache-2.0
"""What makes another benchmark of one that is done: the whole stage, but for engines and figures."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import UserError
from shared.settings import build
from shared.target.model import weights_hash
from stages.bench.config import BenchConfig
from stages.bench.measure import measurement
from stages.bench.report import html
from stages.bench.run import find_subject, run
from tests.heads import write_random_head
from tests.measurements import baseline_requests, engine, head_requests, lossless, under_load
from tests.models import tiny_llama

MEASURED = {
    "head": engine(under_load(head_requests(), wall_s=6.0)),
    "baseline": engine(under_load(baseline_requests(), wall_s=12.0), lossless=lossless()),
}


def config(workspace: Path, **flags: str) -> BenchConfig:
    needed = {"target": "tiny", "head": "head", "prompts": "prompts.jsonl"}
    return build(BenchConfig, {**needed, "workspace": str(workspace), **flags})


def held_against(workspace: Path, **flags: str) -> BenchConfig:
    return config(workspace, earlier_report="before/bench/report.json", **flags)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with two benches that are done, the second held against the first."""
    workspace = tmp_path_factory.mktemp("measured")
    target = tiny_llama(workspace / "tiny", max_length_tokens=512)
    write_random_head(workspace / "head", target=target, draft_vocab_size=128)
    row = '{"id": "q", "prompt": "Why?"}\n'
    (workspace / "prompts.jsonl").write_text(2 * row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "measure", lambda _, name, *__, **___: MEASURED[name])
        patch.setattr(html, "render", lambda _: "drawn elsewhere")
        run(config(workspace, name="before"))
        run(held_against(workspace))
    return workspace


@pytest.fixture
def workspace(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change, where nothing may be measured."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measurement, "measure", never)
    return Path(shutil.copytree(measured, tmp_path / "workspace"))


def refused(config: BenchConfig, key: str) -> None:
    with pytest.raises(UserError, match=rf"a finished artifact of another .* \({key}: was .* now"):
        run(config)


def test_a_second_row_of_the_same_id_is_skipped_and_counted(workspace: Path) -> None:
    manifest = json.loads((workspace / "run" / "bench" / "manifest.json").read_text())
    assert manifest["counts"] == {
        "in": 2,
        "ok": 1,
        "skipped": {"duplicate_id": 1},
        "failed": {},
    }


def test_a_p_eagle_head_is_measured_and_served_in_parallel(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM does not read from the head that it drafts so."""
    tensors = load_file(workspace / "head" / "model.safetensors")
    shutil.copytree(workspace / "head", workspace / "masked")
    save_file(tensors | {"mask_hidden": torch.ones(1, 384)}, workspace / "masked/model.safetensors")
    settings = json.loads((workspace / "head" / "config.json").read_text())
    (workspace / "masked" / "config.json").write_text(json.dumps(settings | {"pard_token": 0}))
    asked: dict[str, Any] = {}

    def measured(_: Any, name: str, speculative: Any, *__: Any, **___: Any) -> Any:
        asked[name] = speculative
        return MEASURED[name]

    monkeypatch.setattr(measurement, "measure", measured)
    monkeypatch.setattr(html, "render", lambda _: "drawn elsewhere")
    run(config(workspace, name="parallel", head="masked"))
    assert asked["head"]["parallel_drafting"] is True
    (best,) = json.loads((workspace / "parallel" / "bench" / "report.json").read_text())["best"]
    words = shlex.split(best["serve"])
    served = json.loads(words[words.index("--speculative-config") + 1])
    assert served == asked["head"]


def test_the_same_is_measured_once(workspace: Path) -> None:
    run(held_against(workspace))
    run(held_against(workspace, startup_timeout_s="9", request_timeout_s="9"))


def test_what_an_engine_is_made_of_is_measured(workspace: Path) -> None:
    refused(held_against(workspace, tensor_parallel_size="2"), "bench.tensor_parallel_size")
    refused(held_against(workspace, engine_args="{enforce_eager: true}"), "bench.engine_args")


def test_another_report_at_the_same_path_is_another_gate(workspace: Path) -> None:
    path = workspace / "before" / "bench" / "report.json"
    report = json.loads(path.read_text())
    report["head"]["acceptance"]["acceptance_length"] = 9.0
    path.write_text(json.dumps(report))
    refused(held_against(workspace), "input.earlier_report")


def test_another_chat_template_makes_other_prompts(workspace: Path) -> None:
    path = workspace / "tiny" / "chat_template.jinja"
    path.write_text("Be brief. " + path.read_text())
    refused(held_against(workspace), "input.tokenizer")


def test_a_head_in_pickles_is_told_from_another(workspace: Path) -> None:
    def digest() -> str:
        return find_subject(config(workspace)).inputs["head"]

    head = workspace / "head"
    assert digest() == weights_hash(head)  # benches that are done keep their identity
    weights = load_file(head / "model.safetensors")
    (head / "model.safetensors").unlink()
    torch.save(weights, head / "pytorch_model.bin")
    (head / "training_args.bin").write_bytes(b"no weights")
    before = digest()
    assert before == digest()
    weights["fc.weight"][0, 0] += 1
    torch.save(weights, head / "pytorch_model.bin")
    assert digest() != before
