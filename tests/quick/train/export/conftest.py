# SPDX-License-Identifier: Apache-2.0
"""The heads that warm starts begin from."""

from pathlib import Path

import pytest

from stages.train.export.hf import export_head
from tests.heads import write_random_head
from tests.models import tiny_llama
from tests.quick.train.export.warm_starts import AUX, start


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    target = tiny_llama(folder / "tiny")
    write_random_head(folder / "ours", target=target, draft_vocab_size=128, aux_layers=AUX)
    write_random_head(folder / "full", target=target, aux_layers=AUX)
    head = start(folder, "ours")
    names = ["LlamaForCausalLM"]
    export_head(
        head,
        folder / "theirs",
        target="t",
        target_architectures=names,
        provenance={},
        dtype="float32",
    )
    return folder
