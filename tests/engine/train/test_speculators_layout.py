# SPDX-License-Identifier: Apache-2.0
"""The speculators layout through vLLM's own reader of it; no engine is started."""

from pathlib import Path

from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

from shared.io.files import read_json
from stages.train.export.hf import export_head
from tests.quick.train.export.small_head import CONFIG, make_head


def test_vllm_reads_the_head_and_its_draft_length(tmp_path: Path) -> None:
    export_head(
        make_head(),
        tmp_path / "head",
        target="models/small",
        target_architectures=["LlamaForCausalLM"],
        provenance={},
        num_draft_tokens=5,
    )
    found = SpeculatorsConfig.from_pretrained(tmp_path / "head")
    assert found.architectures == ["Eagle3LlamaForCausalLM"]
    assert found.eagle_aux_hidden_state_layer_ids == list(CONFIG.aux_layers)
    assert found.norm_before_residual is False
    assert (found.draft_vocab_size, found.hidden_size) == (12, 16)
    assert found.rope_parameters["rope_theta"] == CONFIG.rope_theta
    speculative = SpeculatorsConfig.extract_vllm_speculative_config(
        read_json(tmp_path / "head" / "config.json")
    )
    assert speculative == {"method": "eagle3", "num_speculative_tokens": 5}
