# SPDX-License-Identifier: Apache-2.0
"""Configs of well-known targets, what they are, and plans for them."""

import functools
import json
from pathlib import Path
from typing import Any

from shared.settings import build
from stages.ops.config import PlanConfig
from stages.ops.plan.architecture import understand
from stages.ops.plan.model import Plan, make_plan

CONFIGS = Path(__file__).resolve().parents[3] / "fixtures" / "configs"
# Parameters as the models' publishers count them (without multi-token prediction); kind; backend;
# width of the draft head's MLP.
KNOWN: dict[str, tuple[int, list[str], str, int]] = {
    "llama-3.1-8b-instruct": (8_030_261_248, ["dense"], "vllm", 14336),
    "llama-3.2-1b-instruct": (1_235_814_400, ["dense"], "vllm", 8192),
    "mistral-7b-instruct-v0.1": (7_241_732_096, ["dense", "sliding window"], "vllm", 14336),
    "mixtral-8x7b-instruct-v0.1": (46_702_792_704, ["MoE"], "hf", 14336),
    "qwen3-30b-a3b": (30_532_122_624, ["MoE"], "vllm", 6144),
    "gpt-oss-20b": (20_914_757_184, ["MoE", "sliding window"], "vllm", 11520),
    "gemma-3-27b-it": (27_432_406_640, ["dense", "VLM", "sliding window"], "hf", 21504),
    "qwen2.5-vl-7b-instruct": (8_292_166_656, ["dense", "VLM"], "vllm", 18944),
    "deepseek-v3": (671_026_419_200, ["MoE", "MLA", "custom code"], "hf", 18432),
    "kimi-k2-instruct": (1_026_408_232_448, ["MoE", "MLA", "custom code"], "hf", 18432),
    "qwen3-next-80b-a3b-instruct": (79_674_391_296, ["MoE", "hybrid"], "hf", 5120),
}


def config_of(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


@functools.cache
def plan_of(name: str) -> Plan:
    return make_plan(name, understand(config_of(name), name))


def settings(**flags: str) -> PlanConfig:
    return build(PlanConfig, {"model": "m", **flags})
