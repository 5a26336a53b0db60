# SPDX-License-Identifier: Apache-2.0
"""What stands in a chain's way is named before its first stage."""

import functools
import gzip
import http.server
import json
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from shared.runtime import compiler
from stages.ops.chain import preflight
from stages.ops.chain.machine import Machine
from tests.quick.ops.chain.recipes import CONFIG, CPU, GIB, TENSORS, problems, steps
from tests.quick.shared.conversations.gallery import FOLDER, tokenizer_of


@pytest.fixture
def cuda_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages' packages, but torch for CUDA."""
    found = preflight._installed

    def installed(python: str) -> dict[str, str]:
        return {**found(python), "torch": "2.13.0+cu130"}

    monkeypatch.setattr(preflight, "_installed", installed)


def test_torch_for_a_processor_beside_a_gpu_is_refused(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy = Machine((("Toy", GIB),), 64 * GIB, GIB)
    found = problems(steps(workspace), workspace, roomy)
    assert [line.split("'")[0] for line in found] == ["synth", "dump", "train", "bench"]
    assert "expected torch for CUDA beside 1 GPUs, found 2.13.0+cpu. Run `make clean" in found[0]
    served = {"synth": {"mode": "keep"}, "dump": {"backend": "hf"}}
    found = problems(steps(workspace, served), workspace, roomy)
    assert [line.split("'")[0] for line in found] == ["dump", "train", "bench"]


@pytest.mark.usefixtures("cuda_torch")
def test_a_gpu_s_kernels_need_a_compiler_and_python_s_headers(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    roomy = Machine((("Toy", GIB),), 64 * GIB, GIB)
    python = tmp_path / "python"  # bench has an interpreter of its own, with headers
    (tmp_path / "Python.h").touch()
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *metadata*) echo "{{}}";; *) echo {tmp_path};; esac\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("EYRIE_BENCH_PYTHON", str(python))
    assert compiler_lines(workspace, roomy) == []
    preflight._include_folder.cache_clear()
    (tmp_path / "include.py").write_text("print('/nowhere')")
    monkeypatch.setattr(compiler, "__file__", str(tmp_path / "include.py"))
    (line,) = compiler_lines(workspace, roomy)
    assert line.startswith("synth and train: expected a C compiler and Python's headers,")
    assert line.endswith(
        "found no /nowhere/Python.h. Install both (Debian and Ubuntu: apt-get "
        "install gcc python3-dev)."
    )
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    first, second = compiler_lines(workspace, roomy)
    assert "found no C compiler and no /nowhere/Python.h." in first
    assert second.startswith("bench: ") and "found no C compiler. " in second
    assert compiler_lines(workspace, Machine((), 64 * GIB, GIB)) == []
    preflight._include_folder.cache_clear()


def compiler_lines(workspace: Path, machine: Machine) -> list[str]:
    return [line for line in problems(steps(workspace), workspace, machine) if "compiler" in line]


@pytest.mark.usefixtures("cuda_torch")
def test_what_can_be_seen_is_named(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = steps(workspace)
    assert problems(whole, workspace) == []
    little = Machine((), 64 * GIB, 64 << 20)
    (shm,) = problems(whole, workspace, little)
    assert shm.startswith("/dev/shm: expected 160 MiB free for vLLM, found 64 MiB. Give")
    (memory,) = {line.split(": ", 1)[1] for line in problems(whole, workspace, Machine((), 9, GIB))}
    assert "GiB for the target's weights, found CPU" in memory

    small = Machine((("Toy", 500),) * 2, 64 * GIB, GIB)
    found = problems(whole, workspace, small)
    assert len(found) == 3  # synth, dump and bench load the target; train does not
    assert all("a GPU for the target's weights" in line for line in found)
    halves = steps(workspace, {name: {"tensor_parallel_size": 4} for name in ("synth", "bench")})
    found = problems(halves, workspace, Machine((("Toy", 100_000),) * 2, 64 * GIB, GIB))
    assert ["expected 4 GPUs" in line for line in found] == [True, True]

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    (disk,) = problems(whole, workspace)
    assert "for hidden states and checkpoints, found 0.0 GB" in disk


@pytest.mark.usefixtures("cuda_torch")
def test_a_target_that_hf_spreads_over_the_gpus_is_shared_by_them_all(workspace: Path) -> None:
    pair = Machine((("Toy", 100_000),) * 2, 64 * GIB, GIB)  # a half fits one, the whole none
    assert [line.split("'")[0] for line in problems(steps(workspace), workspace, pair)] == [
        "synth",
        "bench",
    ]
    alone = Machine((("Toy", 100_000),), 64 * GIB, GIB)
    (told,) = [x for x in problems(steps(workspace), workspace, alone) if x.startswith("dump's")]
    assert "Take a machine with more" in told
    roomy = Machine((("Toy", GIB),) * 2, 64 * GIB, GIB)
    two = steps(workspace, {"dump": {"data_parallel": 2}})  # of which each takes one GPU
    assert problems(two, workspace, roomy) == []


@pytest.mark.usefixtures("cuda_torch")
@pytest.mark.parametrize("machine", [Machine((), 9, GIB), Machine((("Toy", 9),), 64 * GIB, GIB)])
def test_answers_that_are_kept_need_no_memory_for_the_target(
    workspace: Path, machine: Machine
) -> None:
    kept = steps(workspace, {"synth": {"mode": "keep"}})
    found = problems(kept, workspace, machine)
    assert [line.split("'")[0] for line in found] == ["dump", "bench"]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a server that has /health, and no /v1/health."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "health").touch()
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "site")
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("path", ["/v1", "/v1/"])
def test_an_endpoint_is_asked_for_its_health_as_its_stage_takes_it(
    workspace: Path, address: str, path: str
) -> None:
    url = address + path
    changes: dict[str, Any] = {"synth": {"endpoints": [url]}, "bench": {"endpoint": url}}
    assert problems(steps(workspace, changes), workspace) == []
    changes["bench"]["baseline_endpoint"] = "http://127.0.0.1:9"
    (found,) = problems(steps(workspace, changes), workspace)
    assert "a server at http://127.0.0.1:9, found" in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"draft_vocab_size": 600}}, "at most the target's 512 tokens, found 600"),
        ({"run": {"max_length_tokens": 999}}, "at most the target's 256 positions, found 999"),
        ({"run": {"aux_layers": [2, 4, 8]}}, r"each 0 <= id < 8 .*found \[2, 4, 8\]"),
        (
            {"run": {"target": "modle"}},
            "run.target: expected a model's folder at .*modle, or a hub id",
        ),
        ({"synth": {"prompts": "none.jsonl"}}, "synth.prompts: expected a file"),
        ({"bench": {"prompts": "none.jsonl"}}, "bench.prompts: expected a file"),
        ({"dump": {"states": "nowhere"}}, "dump.states: expected a folder at .*/nowhere"),
        ({"synth": {"endpoints": ["http://127.0.0.1:9"]}}, "a server at http://127.0.0.1:9, found"),
        ({"run": {"chat_template_kwargs": {"enable": 1}}}, "found enable, which it does not read"),
    ],
)
def test_a_recipe_that_cannot_work_is_named(
    workspace: Path, changes: dict[str, dict[str, Any]], message: str
) -> None:
    (found,) = problems(steps(workspace, changes), workspace)
    assert re.search(message, found)


def test_reasoning_that_would_be_trained_on_is_named(workspace: Path) -> None:
    tokenizer_of(FOLDER / "seed-oss.jinja").save_pretrained(workspace / "model")
    dropped = {"run": {"reasoning": "drop"}}
    (found,) = problems(steps(workspace, dropped), workspace)
    assert "synth.reasoning_end: expected what ends the reasoning" in found
    assert problems(steps(workspace, {**dropped, "synth": {"mode": "keep"}}), workspace) == []
    ends = {"synth": {"reasoning_end": "</seed:think>"}}
    assert problems(steps(workspace, dropped | ends), workspace) == []


def test_a_target_without_what_it_needs_is_named(workspace: Path) -> None:
    whole = steps(workspace)
    (workspace / "model" / "tokenizer_config.json").write_text("{}")
    (found,) = problems(whole, workspace)
    assert "expected a chat template" in found
    (workspace / "model" / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    custom = CONFIG | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    (workspace / "model" / "config.json").write_text(json.dumps(custom))
    assert problems(whole, workspace) == []  # transformers has code of its own for it
    (workspace / "model" / "config.json").write_text(json.dumps({**custom, "model_type": "mine"}))
    (found,) = problems(whole, workspace)
    assert "run.trust_remote_code: expected true" in found
    assert problems(steps(workspace, {"run": {"trust_remote_code": True}}), workspace) == []


@pytest.mark.parametrize(
    ("config", "without", "message"),
    [
        ({}, "lm_head.weight", "expected a tensor lm_head.weight, since LlamaForCausalLM does not"),
        ({}, "model.norm.weight", "expected the tensors embed_tokens.weight and norm.weight"),
        ({"vocab_size": 500}, "", r"model.embed_tokens.weight of shape \[500, 64\]"),
        ({"architectures": ["PhiForCausalLM"], "model_type": "phi"}, "", "lm_head has a bias"),
        (
            {"model_type": "mine", "architectures": ["Mine"]},
            "",
            "no class for the model_type 'mine'",
        ),
        ({"hidden_act": "none of it"}, "", "transformers' class for llama does not take it"),
    ],
)
def test_a_target_that_train_cannot_take_is_named_before_the_first_stage(
    workspace: Path, config: dict[str, Any], without: str, message: str
) -> None:
    tensors = {name: value for name, value in TENSORS.items() if name != without}
    save_file(tensors, workspace / "model" / "model.safetensors")
    (workspace / "model" / "config.json").write_text(json.dumps(CONFIG | config))
    (found,) = problems(steps(workspace), workspace)
    assert re.search(message, found)


def with_config(workspace: Path, **changes: Any) -> None:
    (workspace / "model" / "config.json").write_text(json.dumps(CONFIG | changes))


def test_a_target_that_vllm_serves_no_head_to_is_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixtral = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    with_config(workspace, **mixtral)
    (found,) = problems(steps(workspace), workspace)
    assert "found MixtralForCausalLM, which does not in vLLM" in found
    assert "{model_impl: transformers}" in found
    wrapped = {"bench": {"engine_args": {"model-impl": "transformers"}}}
    assert problems(steps(workspace, wrapped), workspace) == []
    assert problems(steps(workspace)[:3], workspace) == []
    with_config(workspace, architectures=["MptForCausalLM"])
    found = problems(steps(workspace, wrapped), workspace)[-1]
    assert "which is no longer in vLLM" in found
    assert "Leave bench out (--skip bench)" in found
    with_config(workspace, **mixtral)
    packages = preflight._installed
    monkeypatch.setattr(preflight, "_installed", lambda p: {**packages(p), "vllm": "9.9"})
    assert problems(steps(workspace), workspace) == []  # of which the table knows nothing


@pytest.mark.parametrize(
    ("config", "obstacle"),
    [
        ({"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}, "finds no embed_t"),
        ({"architectures": ["OPTForCausalLM"], "model_type": "opt"}, "finds no embed_tokens in it"),
        ({"architectures": ["BloomForCausalLM"], "model_type": "bloom"}, "cannot replace its att"),
        (
            {"architectures": ["PaliGemmaForConditionalGeneration"], "vision_config": {}},
            "names no text model of a vision model",
        ),
        (
            {
                "architectures": ["Lfm2ForCausalLM"],
                "model_type": "lfm2",
                "layer_types": ["conv", "full_attention"] * 4,
            },
            "runs no layers that keep a state",
        ),
    ],
)
def test_a_target_that_vllm_s_wrapper_serves_no_head_to_is_named(
    workspace: Path, config: dict[str, Any], obstacle: str
) -> None:
    with_config(workspace, **config)
    wrapped = steps(workspace, {"bench": {"engine_args": {"model_impl": "transformers"}}})
    (found,) = [line for line in problems(wrapped, workspace) if line.startswith("bench: ")]
    assert f"{config['architectures'][0]}: vLLM" in found and obstacle in found
    assert "Leave bench out" in found
    (found,) = [line for line in problems(steps(workspace), workspace) if "SupportsEagle3" in line]
    assert "Leave bench out" in found and "model_impl" not in found


def test_a_target_that_vllm_runs_on_gpus_alone_is_named(workspace: Path) -> None:
    def found(machine: Machine, changes: dict[str, Any], **config: Any) -> list[str]:
        with_config(workspace, **config)
        lines = problems(steps(workspace, changes), workspace, machine)
        return [line.split(", or")[0] for line in lines if "a GPU, since" in line]

    laguna = {"architectures": ["LagunaForCausalLM"]}
    assert found(Machine((("Toy", GIB),), 64 * GIB, GIB), {}, **laguna) == []
    assert [line.split(":")[0] for line in found(CPU, {}, **laguna)] == ["synth", "bench"]
    kept = {"synth": {"mode": "keep"}}
    for backend in ("vllm", "auto"):
        captured = found(CPU, kept | {"dump": {"backend": backend}}, **laguna)
        assert [line.split(":")[0] for line in captured] == ["dump", "bench"]
    latent = {"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 16}
    for beside_a_head in (
        latent,
        {"architectures": ["NemotronHForCausalLM"], "mamba_num_heads": 4},
        {"architectures": ["NemotronHForCausalLM"], "layers_block_type": ["mamba"] * 8},
    ):
        (line,) = found(CPU, {"dump": {"backend": "auto"}}, **beside_a_head)
        assert line.startswith("bench: expected a GPU, since vLLM")
        assert line.endswith("found none. Take a machine with GPUs")
    ungated = {"architectures": ["NemotronHForCausalLM"], "layers_block_type": ["moe"] * 8}
    assert [line.split(":")[0] for line in found(CPU, {}, **ungated)] == ["synth", "bench"]
    sparse = {"architectures": ["DeepseekV32ForCausalLM"], "kv_lora_rank": 16}
    lines = found(CPU, {"dump": {"backend": "auto"}}, **sparse)  # which takes transformers
    assert [line.split(":")[0] for line in lines] == ["synth", "bench"]


def test_what_vllm_imports_for_a_vision_model_is_asked_for(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def found(**changes: Any) -> list[str]:
        lines = problems(steps(workspace, changes), workspace)
        return [line for line in lines if "torchvision" in line]

    packages = preflight._installed
    with_config(workspace, architectures=["Qwen3VLForConditionalGeneration"], vision_config={})
    for extra, stages in (({}, ["synth", "dump", "bench"]), ({"torchvision": "0.28.0"}, [])):
        installed = packages(sys.executable) | extra
        monkeypatch.setattr(preflight, "_installed", lambda _, installed=installed: installed)
        lines = found(dump={"backend": "vllm"})
        assert [line.split(":")[0] for line in lines] == stages
        assert ("no head was tried beside a vision model" in caplog.text) == bool(extra)
    monkeypatch.setattr(preflight, "_installed", packages)
    lines = found(synth={"mode": "keep"}, dump={"backend": "auto"})
    assert [line.split(":")[0] for line in lines] == ["bench"]


def test_a_quantised_output_layer_sends_to_the_original(workspace: Path) -> None:
    packed = TENSORS | {"lm_head.weight": torch.zeros(512, 32, dtype=torch.uint8)}
    save_file(packed, workspace / "model" / "model.safetensors")
    (found,) = problems(steps(workspace), workspace)
    assert (
        "expected lm_head.weight in 16 or 32 bits, found U8. Name the 16-bit original in" in found
    )


def test_scaled_positions_reach_further_than_the_config_says(workspace: Path) -> None:
    long = steps(workspace, {"run": {"max_length_tokens": 999}})
    assert len(problems(long, workspace)) == 1
    scaled = CONFIG | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    (workspace / "model" / "config.json").write_text(json.dumps(scaled))
    assert problems(long, workspace) == []


def test_the_hub_is_asked_only_where_it_must_be(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    found = steps(workspace, {"run": {"target": "nobody/nothing"}})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (offline,) = problems(found, workspace)
    assert "nobody/nothing in the hub's cache, found none, offline" in offline


def test_other_packages_than_a_stage_needs_are_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = steps(workspace)
    monkeypatch.setitem(preflight._FLOORS, "train", {"torch": ">=99", "no-such-package": ">=1"})
    monkeypatch.setenv("EYRIE_BENCH_PYTHON", "/nowhere/python")
    torch, missing, python = problems(whole, workspace)
    assert "train's packages: expected torch >=99, found 2." in torch
    assert "expected no-such-package >=1, found none" in missing
    assert "bench: expected a Python interpreter at /nowhere/python" in python


def test_a_vllm_that_would_drop_the_newer_norms_is_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = preflight._installed
    older = {"vllm": "0.31.1+cpu"}
    monkeypatch.setattr(preflight, "_installed", lambda python: {**found(python), **older})
    (told,) = problems(steps(workspace), workspace)
    assert "bench's vLLM serves; EAGLE-3.1 needs vLLM >=0.32, found vLLM 0.31.1" in told
    assert problems(steps(workspace, {"train": {"variant": "eagle3"}}), workspace) == []


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("p.jsonl", b"", "it is empty"),
        ("p.jsonl", b'{"text": "a"}\n{"text": "b"}\n{', "2 no_prompt, 1 broken_json"),
        ("p.jsonl", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (
            "p.jsonl.gz",
            gzip.compress(b'{"prompt": "a"}\n' * 9, mtime=0)[:-9],
            "Compressed file ended",
        ),
    ],
)
def test_rows_that_no_stage_can_use_are_refused(
    name: str, content: bytes, found: str, workspace: Path
) -> None:
    (workspace / name).write_bytes(content)
    (line,) = problems(steps(workspace, {"synth": {"prompts": name}}), workspace)
    assert found in line


def test_a_look_at_the_rows_says_nothing_of_what_the_stage_itself_will_say(
    workspace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (workspace / "p.jsonl").write_text('{"prompt": "a", "notes": "never read"}\n')
    assert problems(steps(workspace, {"synth": {"prompts": "p.jsonl"}}), workspace) == []
    assert not caplog.messages
