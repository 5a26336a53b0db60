# SPDX-License-Identifier: Apache-2.0
"""plan's count against real safetensors: models of the same configs, made small, by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from shared.io.safetensors_files import list_tensors
from stages.ops.plan.architecture import understand
from stages.ops.plan.weights import weigh
from tests.models import tiny_moe
from tests.stages.ops.test_validate import ops

CONFIGS = Path(__file__).resolve().parents[2] / "fixtures" / "configs"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 512,
    "moe_intermediate_size": 40,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 16,
    "shared_expert_intermediate_size": 56,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
SMALL_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_hidden_layers": 2,
    "depth": 3,
    "image_size": 56,
    "out_hidden_size": 64,
}
DEPTH = 5
# Their own code lies beside their weights; this is the same architecture in transformers.
KIND = {"kimi_k2": "deepseek_v3"}


def shrunk(raw: dict[str, Any]) -> dict[str, Any]:
    """The same architecture with small sizes, a few layers of each kind, and no quantisation."""
    small = {
        key: value for key, value in raw.items() if key not in ("quantization_config", "auto_map")
    }
    text = small["text_config"] = dict(small["text_config"]) if "text_config" in small else small
    if text is small:
        del small["text_config"]
    text |= {key: value for key, value in SMALL.items() if key in text or key == "vocab_size"}
    text |= {"num_hidden_layers": DEPTH, "pad_token_id": None}
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:DEPTH]
    if "kv_lora_rank" in text:
        text["num_key_value_heads"] = text["num_attention_heads"]
    if "vision_config" in small:
        vision = small["vision_config"]
        small["vision_config"] = vision | {k: v for k, v in SMALL_VISION.items() if k in vision}
    for name in ("bos_token_id", "eos_token_id", "image_token_id", "video_token_id"):
        small.pop(name, None)
    return small


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_count_is_what_a_real_model_stores(path: Path, tmp_path: Path) -> None:
    small = shrunk(json.loads(path.read_text()))
    target = understand(small, path.stem)
    kind = small.pop("model_type")
    config = AutoConfig.for_model(KIND.get(kind, kind), **small)
    auto = AutoModelForImageTextToText if target.is_vlm else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = weigh(target, list_tensors(tmp_path))
    counted = weigh(target, None)
    assert counted.parameters == stored.parameters
    # Headers and a few small tensors in 32 bits.
    (file,) = tmp_path.glob("*.safetensors")
    assert counted.bytes == pytest.approx(stored.bytes, rel=0.002)
    assert stored.bytes == pytest.approx(file.stat().st_size, rel=0.2)


def test_a_planned_recipe_passes_preflight(tmp_path: Path) -> None:
    """A real MoE in a folder: planned, and its recipe through `run --dry_run`."""
    tiny_moe(tmp_path / "moe")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    planned = ops(
        tmp_path, "plan", "moe", "--out", str(tmp_path / "recipe.yaml"), "--length", "128"
    )
    assert planned.returncode == 0, planned.stderr
    train = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["train"]
    assert "intermediate_size" not in train  # the config has a dense width of its own
    recipe = str(tmp_path / "recipe.yaml")
    dry = ops(tmp_path, "run", "--recipe", recipe, "--dry_run", "--skip", "bench")
    assert dry.returncode == 0, dry.stderr
    assert "1 row, at most 128 tokens" in dry.stdout
