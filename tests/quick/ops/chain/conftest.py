# SPDX-License-Identifier: Apache-2.0
"""What the chain's tests begin with."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

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
    write(tmp_path, {})
    return tmp_path
