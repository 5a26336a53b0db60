# SPDX-License-Identifier: Apache-2.0
"""What a single setting names is there, and an engine takes it: told before the first stage."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.config import StageConfig
from shared.errors import UserError
from shared.settings import build
from stages.bench.config import BenchConfig
from stages.dump.config import DumpConfig
from stages.ops.chain.preflight import checks, vllm_options
from stages.synth.config import SynthConfig
from tests.heads import write_random_head
from tests.quick.ops.chain.recipes import problems, steps

ONLY_TRAIN = slice(2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bench": {"earlier_report": "nope.json"}}, "bench.earlier_report: expected a file"),
        ({"bench": {"earlier_report": "prompts.jsonl"}}, "prompts.jsonl is not valid JSON"),
        (
            {"bench": {"head": "nope"}},
            "bench.head: expected a draft head's folder at .*/nope, or a hub",
        ),
        ({"bench": {"head": "model"}}, "model: it has no fc.weight, which combines"),
        (
            {"bench": {"max_tokens": 300}},
            "expected room for a prompt, 300 tokens and 3 x 3 drafted",
        ),
        ({"bench": {"max_tokens": 64, "num_speculative_tokens": 100}}, "found at least 365. Lower"),
        (
            {"bench": {"max_tokens": 9, "num_speculative_tokens": 200}},
            "expected at most 128, which",
        ),
        (
            {"bench": {"engine_args": {"max_num_seq": 8}}},
            "bench.engine_args.* Did you mean max_num",
        ),
        ({"bench": {"speculative_args": {"modle": 8}}}, "found modle. Did you mean model?"),
        (
            {"dump": {"backend": "auto", "engine_args": {"nope_nope": 1}}},
            "dump.engine_args: .* Remove",
        ),
        ({"synth": {"server_args": {"max_num_seks": 1}}}, "synth.server_args: .*mean max_num_seqs"),
    ],
)
def test_a_setting_that_its_stage_would_refuse_is_named(
    workspace: Path, changes: dict[str, dict[str, Any]], message: str
) -> None:
    found = problems(steps(workspace, changes), workspace)
    assert any(re.search(message, line) for line in found), found


def test_what_is_there_and_what_vllm_takes_is_no_obstacle(workspace: Path) -> None:
    changes = {
        "synth": {
            "max_samples": 2,
            "server_args": {
                "enable_auto_tool_choice": True,
                "--no-enable-prefix-caching": True,
                "uvicorn-log-level": "info",
                "data_parallel_size": 2,
            },
        },
        "bench": {
            "max_tokens": 200,
            "engine_args": {"--max-num-seqs": 8, "enable_prefix_caching": False},
            "speculative_args": {"draft_tensor_parallel_size": 1},
            "head": "org/head",
        },
    }
    assert problems(steps(workspace, changes), workspace) == []
    own = {"bench": {"head": str(workspace / "run" / "export")}}
    assert problems(steps(workspace, own), workspace) == []
    (told,) = problems(steps(workspace, own)[3:], workspace)
    assert "bench.head: expected a draft head's folder" in told


def test_a_head_is_held_to_its_target(workspace: Path, tmp_path: Path) -> None:
    write_random_head(tmp_path / "head", target=workspace / "model", draft_vocab_size=128)
    chosen = {"bench": {"head": "head", "max_tokens": 9}}
    assert problems(steps(workspace, chosen), workspace) == []
    path = tmp_path / "head" / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"vocab_size": 9}))
    (told,) = problems(steps(workspace, chosen), workspace)
    assert re.search(r"bench.head .*\(vocabulary, hidden size \(512, 64\)\), found \(9, 64\)", told)
    (tmp_path / "head" / "model.safetensors").unlink()
    (told,) = problems(steps(workspace, chosen), workspace)
    assert "expected an EAGLE-3 head" in told


def test_a_dump_that_train_would_borrow_is_there_and_finished(workspace: Path) -> None:
    chosen = {"train": {"dump_of": "other"}}

    def told() -> list[str]:
        return problems(steps(workspace, chosen)[ONLY_TRAIN], workspace)

    assert "train.dump_of: expected another run with a dump, found none" in told()[0]
    dump = workspace / "other" / "dump"
    dump.mkdir(parents=True)
    assert "train.dump_of: expected a finished dump in" in told()[0]
    (dump / "manifest.json").write_text("{}")
    assert told() == []
    (beside,) = problems(steps(workspace, chosen), workspace)
    assert "found synth and dump. Add --skip synth,dump, or leave dump_of out." in beside
    (workspace / "run" / "dump").mkdir(parents=True)
    assert "this run has a folder of its own at" in told()[0]


@pytest.mark.parametrize("stage", ["synth", "dump", "bench"])
def test_a_precision_that_no_engine_has_is_refused_by_its_stage(
    workspace: Path, stage: str
) -> None:
    with pytest.raises(UserError, match=rf"{stage}.dtype: expected .*found 'bfloat61'"):
        steps(workspace, {stage: {"dtype": "bfloat61"}})


@pytest.mark.parametrize(
    ("config", "setting", "kind"),
    [
        (SynthConfig, "server_args", "server"),
        (DumpConfig, "engine_args", "engine"),
        (BenchConfig, "engine_args", "engine"),
        (BenchConfig, "speculative_args", "speculative"),
    ],
)
def test_no_name_of_vllms_is_taken_for_the_beginning_of_a_stages_own(
    config: type[StageConfig], setting: str, kind: str
) -> None:
    vllm = importlib.util.find_spec("vllm")
    assert vllm and vllm.submodule_search_locations
    flags = {"target": "t"} | ({"prompts": "p"} if config is SynthConfig else {})
    free = []
    for name in vllm_options.read(Path(vllm.submodule_search_locations[0]))[kind]:
        try:
            build(config, flags | {setting: f"{{{name}: 1}}"})
            free.append(name)
        except UserError as refused:
            is_alias = name.startswith("spec_")
            assert is_alias or f"found {name}, which is set by" in refused.problem, name
    assert len(free) > 20


def test_options_are_not_held_to_a_vllm_that_is_laid_out_otherwise(tmp_path: Path) -> None:
    assert vllm_options.read(tmp_path) == {}
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "arg_utils.py").write_text("class EngineArgs:\n    model: str = ''\n")
    assert vllm_options.read(tmp_path) == {"engine": ["model"]}


@pytest.mark.parametrize("name", ["held_out.jsonl", "link.jsonl", "copy.jsonl", "*.jsonl"])
def test_prompts_that_training_sees_are_told_and_no_obstacle(workspace: Path, name: str) -> None:
    prompts = workspace / "held_out.jsonl"
    assert list(checks.warnings(steps(workspace))) == []
    if name == "link.jsonl":
        (workspace / name).symlink_to(prompts)
    if name == "copy.jsonl":
        shutil.copy(prompts, workspace / name)
    chosen = {"synth": {"prompts": name}}
    (told,) = checks.warnings(steps(workspace, chosen))
    assert f"bench.prompts: {prompts} is what synth reads too" in told
    assert problems(steps(workspace, chosen), workspace) == []
    other = chosen | {"bench": {"head": "org/head"}}
    assert list(checks.warnings(steps(workspace, other))) == []


def test_a_data_set_of_a_hub_is_the_same_with_the_same_split(workspace: Path) -> None:
    same = {"synth": {"prompts": "org/rows"}, "bench": {"prompts": "org/rows"}}
    (told,) = checks.warnings(steps(workspace, same))
    assert "bench.prompts: org/rows is what synth reads too" in told
    split = same | {"bench": {"prompts": {"path": "org/rows", "split": "test"}}}
    assert list(checks.warnings(steps(workspace, split))) == []
