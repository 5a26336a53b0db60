# SPDX-License-Identifier: Apache-2.0
"""What the chain's tests begin with."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from stages.ops.chain.preflight import packages
from tests.models import tiny_llama
from tests.quick.ops.chain.recipes import CONFIG, TENSORS, write


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A target's folder as far as anything looks before it is loaded, prompts, and a recipe."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    save_file(TENSORS, folder / "model.safetensors")
    prompts = [json.dumps({"prompt": f"say {n}"}) for n in range(5)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    answered = [json.dumps({"question": f"say {n}", "response": f"{n}"}) for n in range(5)]
    (tmp_path / "answered.jsonl").write_text("\n".join(answered))
    held_out = [json.dumps({"prompt": f"say nothing of {n}"}) for n in range(5)]
    (tmp_path / "held_out.jsonl").write_text("\n".join(held_out))
    write(tmp_path, {})
    return tmp_path


@pytest.fixture
def real_target(workspace: Path) -> Path:
    """The same with a target that has a tokenizer, and weights."""
    shutil.rmtree(workspace / "model")
    tiny_llama(workspace / "model", max_length_tokens=256)
    return workspace


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages' packages, but torch for CUDA."""
    found = packages.installed

    def installed(python: str) -> dict[str, str]:
        return {**found(python), "torch": "2.13.0+cu130"}

    monkeypatch.setattr(packages, "installed", installed)
