# SPDX-License-Identifier: Apache-2.0
"""The chain before it starts: which stages, what they will take, what stands in the way; its end."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from shared.config import build
from shared.errors import EXIT_STOPPED, UserError
from shared.paths import RunPaths
from stages.bench.config import BenchConfig
from stages.dump.config import DumpConfig
from stages.ops import expected
from stages.ops.chain import estimates, preflight, processes
from stages.ops.chain.machine import Machine, look
from stages.ops.chain.run import _show_page, run
from stages.ops.config import RunChainConfig
from stages.synth.config import SynthConfig
from stages.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[4]
GIB = 1 << 30
CPU = Machine((), 64 * GIB, GIB)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
TENSORS = {
    "model.embed_tokens.weight": torch.zeros(512, 64).bfloat16(),
    "model.norm.weight": torch.ones(64).bfloat16(),
    "lm_head.weight": torch.zeros(512, 64).bfloat16(),
}  # 131,200 bytes
RECIPE: dict[str, dict[str, Any]] = {
    "run": {"target": "model", "max_length_tokens": 64, "draft_vocab_size": 128},
    "synth": {"prompts": "prompts.jsonl"},
    "dump": {"backend": "hf"},
    "train": {},
    "bench": {"prompts": "prompts.jsonl", "max_prompts": 2},
}

CONFIGS = {"synth": SynthConfig, "dump": DumpConfig, "train": TrainConfig, "bench": BenchConfig}


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


def write(workspace: Path, changes: Mapping[str, dict[str, Any]]) -> Path:
    """The recipe with these settings on top."""
    path = workspace / "recipe.yaml"
    sections = {name: section | changes.get(name, {}) for name, section in RECIPE.items()}
    path.write_text(yaml.safe_dump(sections))
    return path


def config(workspace: Path, **flags: str) -> RunChainConfig:
    needed = {"recipe": str(workspace / "recipe.yaml"), "workspace": str(workspace)}
    return build(RunChainConfig, {**needed, **flags})


def steps(
    workspace: Path, changes: Mapping[str, dict[str, Any]] | None = None
) -> list[processes.Step]:
    """The chain as the stages read the recipe, asked here instead of in processes of their own."""
    path, paths = write(workspace, changes or {}), RunPaths(workspace, "run")
    flags = {"recipe": str(path), "workspace": str(workspace)}
    return [
        processes.Step(
            stage, build(model, flags).model_dump(mode="json"), processes.is_done(stage, paths)
        )
        for stage, model in CONFIGS.items()
    ]


def problems(found: list[processes.Step], workspace: Path, machine: Machine = CPU) -> list[str]:
    return preflight.problems(found, RunPaths(workspace, "run"), machine)


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        ({}, ("synth", "dump", "train", "bench")),
        ({"from": "train"}, ("train", "bench")),
        ({"skip": "synth,dump"}, ("train", "bench")),
        ({"only": "bench,dump", "skip": "bench"}, ("dump",)),
        ({"only": "dump,train", "from": "train"}, ("train",)),
    ],
)
def test_which_stages_are_meant(
    workspace: Path, flags: dict[str, str], stages: tuple[str, ...]
) -> None:
    assert config(workspace, **flags).stages == stages


def test_each_stage_is_asked_what_it_makes_of_the_recipe(workspace: Path) -> None:
    """The other tests ask the same configs in this process."""
    chosen = config(workspace, skip="synth")
    asked = processes.steps(
        chosen, chosen.stages, processes.run_paths(chosen.recipe, chosen.workspace)
    )
    assert asked == steps(workspace)[1:]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"from": "tarin"}, "Input should be 'synth', 'dump', 'train' or 'bench'"),
        ({"skip": "synth,dumb"}, "stages are synth"),
        ({"only": "synth", "from": "dump"}, "leave no stage to run"),
        ({"form": "dump"}, "Did you mean from"),
    ],
)
def test_a_chain_of_nothing_is_refused(
    workspace: Path, flags: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config(workspace, **flags)


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
    ],
)
def test_a_recipe_that_cannot_work_is_named(
    workspace: Path, changes: dict[str, dict[str, Any]], message: str
) -> None:
    import re

    (found,) = problems(steps(workspace, changes), workspace)
    assert re.search(message, found)


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
    import re

    tensors = {name: value for name, value in TENSORS.items() if name != without}
    save_file(tensors, workspace / "model" / "model.safetensors")
    (workspace / "model" / "config.json").write_text(json.dumps(CONFIG | config))
    (found,) = problems(steps(workspace), workspace)
    assert re.search(message, found)


def test_a_target_that_vllm_serves_no_head_to_is_named(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixtral = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    (workspace / "model" / "config.json").write_text(json.dumps(CONFIG | mixtral))
    (found,) = problems(steps(workspace), workspace)
    assert "found MixtralForCausalLM, which does not in vLLM" in found
    assert "{model_impl: transformers}" in found
    wrapped = {"bench": {"engine_args": {"model-impl": "transformers"}}}
    assert problems(steps(workspace, wrapped), workspace) == []
    assert problems(steps(workspace)[:3], workspace) == []
    falcon = {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}  # none to wrap
    for other, how in (
        (falcon, "does not"),
        ({"architectures": ["MptForCausalLM"]}, "is no longer"),
    ):
        (workspace / "model" / "config.json").write_text(json.dumps(CONFIG | other))
        found = problems(steps(workspace, wrapped), workspace)
        assert f"which {how} in vLLM" in found[-1]
        assert "Leave bench out (--skip bench)" in found[-1]
    (workspace / "model" / "config.json").write_text(json.dumps(CONFIG | mixtral))
    monkeypatch.setattr(
        preflight, "_bench_vllm", lambda _: "9.9"
    )  # of which the table knows nothing
    assert problems(steps(workspace), workspace) == []


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


def test_gpus_are_those_that_nvidia_smi_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA L4, 23034'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    machine = look()
    assert machine.gpus == (("NVIDIA H100 80GB HBM3", 81559 << 20), ("NVIDIA L4", 23034 << 20))
    assert machine.least_gpu_bytes == 23034 << 20
    assert machine.memory_bytes > 0
    tool.unlink()
    assert look().gpus == () or shutil.which("nvidia-smi")


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["A", "B", "C"]),
        ("2,0", ["C", "A"]),
        ("GPU-b", ["B"]),
        ("1,7,0", ["B"]),  # CUDA stops at the first that it does not know
        ("", []),
        ("-1", []),
    ],
)
def test_gpus_are_those_that_cuda_would_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, names: list[str]
) -> None:
    """C shares its memory with the processor, and nvidia-smi has no size for it."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\ncase $1 in *uuid*) printf 'GPU-aa\\nGPU-bb\\nGPU-cc\\n';; "
        "*) printf 'A, 10\\nB, 20\\nC, [N/A]\\n';; esac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = look()
    assert [name for name, _ in machine.gpus] == names
    sizes = {"A": 10 << 20, "B": 20 << 20, "C": machine.memory_bytes}
    assert all(size == sizes[name] for name, size in machine.gpus)


@pytest.mark.parametrize(("given", "ranks"), [({}, "2"), ({"EYRIE_RANKS": "1"}, "1")])
def test_train_gets_a_rank_for_each_visible_gpu(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], ranks: str
) -> None:
    tool = workspace / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'A, 10\\nB, 20\\nC, 30\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(workspace), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    play(monkeypatch, workspace, "train", f"echo $2 $EYRIE_RANKS > {workspace}/started")
    assert run(config(workspace, preflight="false", only="train")) == 0
    assert (workspace / "started").read_text().split() == ["stages.train.launch", ranks]


def test_estimates_worked_by_hand(workspace: Path) -> None:
    found = estimates.Estimates(steps(workspace), RunPaths(workspace, "run"), CPU).rows()
    by_stage = {row.stage: row for row in found}
    assert by_stage["synth"].work == "5 rows, at most 320 tokens"
    assert by_stage["dump"].disk == "at most 163.8 kB"  # 5 x 64 tokens x 4 states x 64 x 2 bytes
    assert by_stage["train"].work == "5 rows, at most 640 tokens"  # two epochs
    assert by_stage["bench"].work == "2 rows, at most 512 tokens"
    # fc 64 x 192; q 64 x 128, k and v 32 x 128 each, o 64 x 64; MLP 3 x 64 x 128; 4 norms; lm_head
    weights = 64 * 192 + 128 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128 + 4 * 64 + 128 * 64
    size = 16 * weights + 4 * (512 + 128) * 64
    assert by_stage["train"].memory == f"{size / 1e6:.1f} MB and activations"
    assert {row.time for row in found} == {"unknown"}


def test_the_plan_quotes_what_others_reached_with_as_many_rows(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm start learnt from other rows before; nothing compares with a tiny target."""
    row = {"target": "t", "hidden_size": 64, "samples": 10, "acceptance_length": 2.0, "source": "s"}

    def line(train: dict[str, Any] | None = None) -> str:
        chain = steps(workspace, {"train": train or {}})
        ahead = estimates.Estimates(chain, RunPaths(workspace, "run"), CPU)
        ahead.rows()
        return ahead.expectation()

    assert line() == ""
    monkeypatch.setattr(expected, "published", lambda: [row])
    assert line() == "5 rows x 2 epochs; others reached AL 2.00 from 10 rows (t, s)"
    assert line({"max_samples": 2}).startswith("2 rows x 2 epochs")
    assert line({"init_from": "head"}) == ""


def test_estimates_heed_a_source_s_limit_and_bench_s_turns(workspace: Path) -> None:
    (workspace / "turns.jsonl").write_text(json.dumps({"turns": ["first", "second"]}))
    (workspace / "more.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}')
    changes = {
        "synth": {
            "prompts": None,
            "sources": [{"path": "prompts.jsonl", "max_samples": 2}, {"path": "more.jsonl"}],
        },
        "bench": {"prompts": "turns.jsonl"},
    }
    chain = steps(workspace, changes)
    found = estimates.Estimates(chain, RunPaths(workspace, "run"), CPU).rows()
    by_stage = {row.stage: row for row in found}
    assert by_stage["synth"].work == "4 rows, at most 256 tokens"
    assert by_stage["bench"].work == "1 rows, at most 512 tokens"  # two answers of 256


def ops(workspace: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stages.ops", "run", *words, "--workspace", str(workspace)]
    command += ["--recipe", str(workspace / "recipe.yaml")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_dry_run_shows_the_plan_and_makes_nothing(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(workspace.rglob("*"))
    assert run(config(workspace, dry_run="true")) == 0
    assert "at most 163.8 kB" in capsys.readouterr().out
    write(workspace, {"run": {"draft_vocab_size": 600}})
    expected = "run.draft_vocab_size: expected at most the target's 512 tokens"
    with pytest.raises(UserError, match=expected):
        run(config(workspace, dry_run="true"))
    assert "at most 163.8 kB" in capsys.readouterr().out
    write(workspace, {"train": {"epoch": 1}})
    refused = ops(workspace, "--skip", "synth,dump")
    assert refused.returncode == 2
    assert "train refuses" in refused.stderr
    assert "Did you mean epochs?" in refused.stderr
    assert sorted(workspace.rglob("*")) == before


def play(monkeypatch: pytest.MonkeyPatch, workspace: Path, stage: str, script: str) -> None:
    """Let a stage be this script of a shell."""
    python = workspace / f"python-{stage}"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setenv(f"EYRIE_{stage.upper()}_PYTHON", str(python))


@pytest.mark.parametrize(
    ("script", "code"), [("kill -KILL $$", 137), ("kill -SEGV $$", 139), ("exit 75", 75)]
)
def test_what_ended_a_stage_is_told_as_a_shell_tells_it(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, script: str, code: int
) -> None:
    play(monkeypatch, workspace, "synth", script)
    assert run(config(workspace, preflight="false", only="synth")) == code


def test_a_stage_that_outlives_its_grace_was_killed(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.ops.chain.run._GRACE_S", 0.1)
    deaf = workspace / "deaf"
    monkeypatch.setattr("stages.ops.chain.run.stop_requested", deaf.exists)
    play(monkeypatch, workspace, "synth", f"trap '' TERM; touch {deaf}; exec sleep 60")
    assert run(config(workspace, preflight="false", only="synth")) == 137


def test_a_stop_between_two_stages_begins_no_other(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal arrives while a stage ends by itself, with 0."""
    play(monkeypatch, workspace, "synth", "kill -TERM $PPID")
    play(monkeypatch, workspace, "dump", f"touch {workspace}/begun")
    done = ops(workspace, "--preflight", "false", "--only", "synth,dump")
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert "[stopped] stopped by a signal; dump was not begun." in done.stderr
    assert not (workspace / "begun").exists()


def test_the_page_is_named_as_a_link_and_opened_where_a_desktop_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    paths = RunPaths(tmp_path, "a run")
    _show_page(paths, opens=True)
    assert not caplog.text
    page = paths.report.with_suffix(".html")
    page.parent.mkdir(parents=True)
    page.write_text("<p>")
    _show_page(paths, since_s=time.time() + 5, opens=False)  # an earlier attempt's
    assert not caplog.text
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}.new && mv {opened}.new {opened}\n')
    browser.chmod(0o755)
    monkeypatch.setattr(webbrowser, "_tryorder", None)
    monkeypatch.setenv("BROWSER", str(browser))
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    _show_page(paths, opens=True)
    assert f"file://{tmp_path}/a%20run/bench/report.html" in caplog.text
    assert "no desktop" in caplog.text and not opened.exists()
    monkeypatch.setenv("DISPLAY", ":0")
    _show_page(paths, opens=True)
    assert opened.read_text() == page.as_uri()
