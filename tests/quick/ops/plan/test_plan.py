# SPDX-License-Identifier: Apache-2.0
"""plan on the configs of well-known targets: what they are, how large, and recipes that stages take."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shared.config import build
from shared.errors import UserError
from shared.io.safetensors_files import TensorInfo
from stages.bench.config import BenchConfig
from stages.dump.config import DumpConfig
from stages.ops.chain import sizes
from stages.ops.config import PlanConfig
from stages.ops.expected import expectation, gate
from stages.ops.plan import overlay
from stages.ops.plan.architecture import read_data, understand
from stages.ops.plan.model import Plan, make_plan, warnings
from stages.ops.plan.output import recipe
from stages.ops.plan.run import read_model, run
from stages.synth.config import SynthConfig
from stages.train.config import TrainConfig
from stages.train.loop.optimizer import make_optimizer
from stages.train.model import DraftHead
from tests.quick.train.export.test_export import CONFIG

ROOT = Path(__file__).resolve().parents[4]
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
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


def test_every_config_is_known() -> None:
    assert sorted(KNOWN) == sorted(path.stem for path in CONFIGS.glob("*.json"))


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_target_is(name: str) -> None:
    plan = plan_of(name)
    total, kinds, backend, width = KNOWN[name]
    assert plan.weights.parameters == total
    assert plan.target.kinds == kinds
    assert plan.backend[0] == backend
    assert plan.head.intermediate_size == width


def test_sizes_that_a_config_leaves_out_are_its_class_s() -> None:
    plan = plan_of("gemma-3-27b-it")
    assert "vocab_size" not in config_of("gemma-3-27b-it")["text_config"]
    assert plan.target.target.vocab_size == 262208
    assert plan.head.max_position_embeddings == 131072


def test_bytes_follow_the_quantisation() -> None:
    # bf16, but the experts' matrices take 4.25 bits a value; as the published checkpoint does.
    assert plan_of("gpt-oss-20b").weights.bytes == pytest.approx(13.76e9, rel=0.01)
    # One byte a value of each matrix, and a scale for 128 x 128 of them.
    assert plan_of("deepseek-v3").weights.bytes == pytest.approx(673e9, rel=0.01)
    assert plan_of("llama-3.1-8b-instruct").weights.bytes == 2 * 8_030_261_248


QUANTIZED = {
    "compressed-tensors fp8": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "compressed-tensors w4a16": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "fp8 by channel": {"quant_method": "fp8"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
}


@pytest.mark.parametrize("how", QUANTIZED)
def test_a_size_that_config_json_does_not_say_is_unknown(how: str, tmp_path: Path) -> None:
    """No number is better than a wrong one: the parameters are known, the bytes are not."""
    raw = {**config_of("llama-3.1-8b-instruct"), "quantization_config": QUANTIZED[how]}
    plan = make_plan("m", understand(raw, "m"))
    assert plan.weights.parameters == 8_030_261_248
    assert plan.weights.bytes is None
    assert not plan.placements
    assert any("size is unknown" in text for text in warnings(plan))
    assert "tensor_parallel_size" not in recipe(plan, settings())
    with pytest.raises(UserError, match="weights is unknown"):
        overlay.write(plan, settings(), tmp_path / "overlay")


@pytest.mark.parametrize("how", QUANTIZED)
def test_a_quantised_size_is_that_of_its_tensors(how: str) -> None:
    raw = {**config_of("llama-3.1-8b-instruct"), "quantization_config": QUANTIZED[how]}
    tensors: dict[str, TensorInfo] = {
        "model.embed_tokens.weight": {"dtype": "BF16", "shape": [10, 4]},
        "model.layers.0.q.weight": {"dtype": "F8_E4M3", "shape": [4, 4]},
        "model.layers.0.k.weight": {"dtype": "F4", "shape": [4, 4]},
        "model.layers.0.v.weight_packed": {"dtype": "I32", "shape": [4, 2]},
    }
    plan = make_plan("m", understand(raw, "m"), tensors)
    assert plan.weights.bytes == 80 + 16 + 8 + 32
    assert plan.weights.parameters == 8_030_261_248
    assert plan.weights.source == "safetensors headers"


def test_an_architecture_without_a_class_has_no_size() -> None:
    raw = {
        **config_of("llama-3.1-8b-instruct"),
        "model_type": "x",
        "architectures": ["XForCausalLM"],
    }
    plan = make_plan("m", understand(raw, "m"))
    assert (plan.weights.parameters, plan.weights.bytes) == (None, None)
    assert any("no class for the model_type 'x'" in text for text in warnings(plan))


def test_disk_worked_by_hand() -> None:
    raw = {
        "model_type": "llama",
        "hidden_size": 4,
        "intermediate_size": 8,
        "num_hidden_layers": 7,
        "num_attention_heads": 1,
        "vocab_size": 10,
    }
    plan = make_plan("toy", understand(raw, "toy"))
    # Two embeddings, seven layers of 4 x 16 + 3 x 32 and two norms, the final norm.
    assert plan.weights.parameters == 80 + 7 * (4 * 16 + 3 * 32 + 8) + 4
    assert plan.disk_bytes(3, 5) == 3 * 5 * 4 * 4 * 2  # samples, tokens, states, H, bytes


@pytest.mark.parametrize(
    ("name", "gpu", "stages"),
    [
        ("llama-3.1-8b-instruct", "H100", (1, 1, 8)),
        ("llama-3.1-8b-instruct", "L4", (1, 1, 8)),
        ("mixtral-8x7b-instruct-v0.1", "H100", (2, 1, 4)),
        ("deepseek-v3", "H200", (8, 1, 1)),
        ("deepseek-v3", "H100", (8, 2, 0)),
        ("kimi-k2-instruct", "H100", (8, 3, 0)),
        ("gemma-3-27b-it", "L40S", (2, 1, 4)),
    ],
)
def test_how_many_gpus_hold_it(name: str, gpu: str, stages: tuple[int, int, int]) -> None:
    """(tensor parallel, pipeline parallel, copies a node): weights fill at most three quarters."""
    plan = plan_of(name)
    found = plan.placements[gpu]
    assert (found.tensor_parallel, found.pipeline_parallel, found.copies) == stages
    assert plan.weights.bytes
    share = plan.weights.bytes / (found.tensor_parallel * found.pipeline_parallel)
    assert share <= 0.75 * read_data("gpus.yaml")[gpu]["memory_gib"] * 2**30


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("gpu", ["H100", "GB200"])
def test_every_stage_takes_the_recipe(name: str, gpu: str, tmp_path: Path) -> None:
    plan = plan_of(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(plan, settings(gpu=gpu, target="org/model")))
    flags = {"recipe": str(path), "workspace": str(tmp_path)}
    synth, dump, train, _ = (
        build(stage, flags) for stage in (SynthConfig, DumpConfig, TrainConfig, BenchConfig)
    )
    assert synth.run.target == "org/model"
    assert synth.tensor_parallel_size == plan.placements[gpu].tensor_parallel
    assert dump.backend == KNOWN[name][2]
    width = train.intermediate_size or config_of(name).get("intermediate_size")
    assert (width or plan.target.text["intermediate_size"]) == KNOWN[name][3]


def test_a_shallow_target_gets_aux_layers_that_fit() -> None:
    raw = {**config_of("llama-3.2-1b-instruct"), "num_hidden_layers": 5}
    plan = make_plan("toy", understand(raw, "toy"))
    assert plan.head.aux_layers == (1, 2, 4)
    made = yaml.safe_load(recipe(plan, settings()))
    assert made["run"]["aux_layers"] == [1, 2, 4]
    by_gpu = {"L4": 64, "L40S": 256, "A100-40": 256, "H100": 512}
    made = {gpu: yaml.safe_load(recipe(plan, settings(gpu=gpu))) for gpu in by_gpu}
    assert {gpu: found["synth"]["concurrency"] for gpu, found in made.items()} == by_gpu


def test_the_training_state_is_what_a_head_and_its_optimizer_hold() -> None:
    embeddings = torch.zeros(CONFIG.vocab_size, CONFIG.hidden_size).bfloat16()
    vocabulary = torch.zeros(CONFIG.draft_vocab_size, dtype=torch.int64)
    head = DraftHead(CONFIG, embed_tokens=embeddings, d2t=vocabulary)
    optimizer = make_optimizer(head, learning_rate=1e-3)
    sum(weight.sum() for weight in head.parameters()).backward()
    optimizer.step()
    held = [
        head.embed_tokens,
        head.lm_head.weight.bfloat16(),
    ]  # the latter in place of the target's
    for weight in head.parameters():
        moments = [x for x in optimizer.state[weight].values() if x.dim()]
        held += [weight, weight.grad, *moments]
    assert sizes.train_bytes(CONFIG) == sum(x.nbytes for x in held)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "found list"),
        (
            {"model_type": "siglip_vision_model"},
            "expected whole numbers above 0 as num_hidden_layers",
        ),
        ({"text_config": {"hidden_size": "x"}}, "no class for the model_type None"),
    ],
)
def test_what_is_no_decoder_is_refused(raw: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        understand(raw, "config.json")


def test_a_model_is_a_folder_a_file_or_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert read_model("m", tmp_path)[0] == tmp_path / "m" / "config.json"
    assert read_model("m/config.json", tmp_path)[0] == tmp_path / "m" / "config.json"
    with pytest.raises(UserError, match="found neither"):
        read_model("n", tmp_path)


@pytest.mark.parametrize(
    ("rows", "hidden_size", "expected"),
    [
        (
            50_000,
            4096,
            ["AL 1.94 from 50,000 rows x 5 epochs (Qwen2.5-7B, ", "AL 2.82 from 508,000"],
        ),
        (
            2_000,
            2048,
            ["AL 1.89 from 5,000 rows x 5 epochs at K = 3 (Qwen3-8B, "],
        ),  # the best of 5,000
        (
            10**6,
            4096,
            ["AL 2.82 from 508,000 rows x 2 epochs at K = 5 (Qwen3-8B, speculators pull"],
        ),
        (900, 4096, []),  # too few to compare
        (5_000, 576, []),  # too small a target
        (None, 4096, []),
    ],
)
def test_the_expected_length_quotes_the_figures_next_to_the_rows(
    rows: int | None, hidden_size: int, expected: list[str]
) -> None:
    line = expectation(rows, 2, hidden_size)
    assert line.count("AL ") == len(expected) and bool(line) == bool(expected)
    for part in expected:
        assert part in line


@pytest.mark.parametrize(
    ("rows", "hidden_size", "expected"),
    [
        (50_000, 4096, 1.7),  # 0.9 x 1.94
        (400_000, 4096, 1.7),
        (20_000, 2048, 1.3),  # 0.9 x 1.45, the lowest of 5,000
        (2_000, 2048, 1.3),  # fewer than any figure's
        (600_000, 4096, 2.1),  # 0.9 x 2.817 is above bench's own
        (900, 4096, None),
        (5_000, 576, None),
    ],
)
def test_bench_requires_less_than_others_reached(
    rows: int, hidden_size: int, expected: float | None
) -> None:
    assert gate(rows, hidden_size) == expected


def test_published_figures_name_their_source() -> None:
    for row in read_data("published.yaml"):
        assert row["source"]
        assert 1 <= row["acceptance_length"] <= row.get("k", 7) + 1


def test_the_command_shows_everything_and_writes_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"model": str(CONFIGS / "gpt-oss-20b.json"), "out": str(tmp_path / "r.yaml")}
    flags["gpu"] = "H200"
    run(build(PlanConfig, flags))
    shown = capsys.readouterr().out
    for part in (
        "20,914,757,184",
        "TIKTOKEN_RS_CACHE_DIR",
        "SpecForge",
        "GB200",
        "2.4 TB",
        "expected: 50,000 rows",
    ):
        assert part in shown
    planned = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert planned["train"]["intermediate_size"] == 11520
    assert planned["bench"]["min_acceptance_length"] == 1.7
    run(build(PlanConfig, {**flags, "json": "true"}))
    shown = capsys.readouterr().out
    assert json.loads(shown)["weight_bytes"] == plan_of("gpt-oss-20b").weights.bytes
    with pytest.raises(UserError, match="expected one of H100, H200"):
        run(build(PlanConfig, {**flags, "gpu": "H1"}))
