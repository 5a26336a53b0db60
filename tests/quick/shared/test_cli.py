# SPDX-License-Identifier: Apache-2.0
"""The command line: flags, recipes, refusals, exit codes, and how fast --help answers."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pydantic
import pytest
import torch

from shared import config as configs
from shared import settings
from shared.cli import _outcome, _spell_out, collect_flags
from shared.config import StageConfig, identity
from shared.errors import EXIT_BUG, EXIT_USER, UserError
from shared.runtime.log import format_error
from shared.usage import help_text
from stages.dump.config import DumpConfig
from stages.synth.config import SynthConfig
from stages.train.commands import CurveConfig, ExportConfig
from stages.train.config import TrainConfig


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


STAGES = ("synth", "dump", "train", "bench", "ops")
ROOT = Path(__file__).resolve().parents[3]


def run_stage(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"stages.{arguments[0]}", *arguments[1:]]
    return subprocess.run(
        command, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_instant_and_without_torch(stage: str) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['stages.{stage}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('stages.{stage}', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'vllm', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy else stop.code)\n"
    )
    best_s = 9.0  # of the processor's time: a busy machine says nothing about the code
    for _ in range(3):
        before_s = _children_s()
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        best_s = min(best_s, _children_s() - before_s)
        assert done.returncode == 0, done.stderr
        if best_s < 1.0:
            break
    assert "Exit codes" in done.stdout
    assert best_s < 1.0  # torch alone takes longer


def test_fire_leaves_texts_as_they_are() -> None:
    """Each of these is changed or misread by fire's own parsing."""
    words, flags = collect_flags(
        [
            "demo",
            "--model",
            "0.10",
            "--resume=false",
            "--ids=2,4,5",
            "--max-tokens",
            "7",
            "--seed=-1",
        ]
    )
    assert words == ["demo"]
    assert flags == {
        "model": "0.10",
        "resume": "false",
        "ids": "2,4,5",
        "max_tokens": "7",
        "seed": "-1",
    }


def test_fires_own_flags_are_out_of_reach() -> None:
    with pytest.raises(UserError, match="--"):
        collect_flags(["--", "--interactive"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("synth", "--promts", "x"), "Did you mean prompts?"),
        (("synth", "rum"), "Did you mean run?"),
        (("train", "--target", "t", "--epochs", "many"), "train.epochs"),
        (("train", "--target", "t", "stray"), "unexpected argument 'stray'"),
        (("train", "--epochs", "2", "export"), "python -m stages.train export and then the flags"),
        (("demo", "--seed", "1", "real-target"), "python -m stages.demo real-target"),
        (("bench", "compare"), "--first: needed, but given neither as a flag nor as a word."),
        (("dump", "--target", "t", "--backend", "sglang"), "'vllm', 'hf', 'trtllm' or 'auto'"),
        (("bench", "--recipe", "nowhere.yaml"), "nowhere.yaml"),
        (("synth", "--target", "nowhere", "--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_exit_2_one_message_and_no_traceback(
    arguments: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    done = run_stage(*arguments, "--workspace", str(tmp_path / "w"))
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("ERROR") == 1


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_flag_over_recipe_over_default(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        "run: {target: t, seed: 3, aux_layers: [1, 2, 3]}\n"
        "train: {epochs: 5, learning_rate: 1e-3}\n",
    )
    built = settings.build(
        TrainConfig, {"recipe": str(recipe), "epochs": "7", "aux_layers": "2,4,5"}
    )
    assert (built.epochs, built.learning_rate, built.ttt_steps) == (7, 1e-3, 3)
    assert (built.run.seed, built.run.aux_layers) == (3, (2, 4, 5))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run: {target: t}\ntrain: {ttt_step: 3}\n", "Did you mean ttt_steps?"),
        ("run: {target: t}\ntrian: {}\n", "Did you mean train?"),
        ("run: {target: t, nam: x}\n", "Did you mean name?"),
        ("run: [1]\n", "section run"),
        ("- a\n", "expected sections"),
        ("run: {target: t\n", "not valid YAML"),
        ("run: {target: t, name: ../x}\n", "one folder name"),
        ("run: {name: x}\n", "run.target: needed"),
        ("run: {target: t, max_length_tokens: 1e99}\n", "max_length_tokens"),
    ],
)
def test_a_bad_recipe_names_the_key(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r".") as refused:
        settings.build(TrainConfig, {"recipe": str(write_recipe(tmp_path, text))})
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("config", "flags", "told"),
    [
        (
            TrainConfig,
            {"epochs": "0"},
            "train.epochs: expected at least 1, found '0' (from --epochs).",
        ),
        (
            TrainConfig,
            {"epochs": "a"},
            "train.epochs: expected a whole number, found 'a' (from --epochs)",
        ),
        (TrainConfig, {"variant": "x"}, "'eagle3' or 'eagle3.1', found 'x' (from --variant)."),
        (TrainConfig, {"seed": "-1"}, "run.seed: expected at least 0, found '-1' (from --seed)."),
        (
            TrainConfig,
            {"batch_tokens": "2"},
            "batch_tokens: expected at least 8 or 'auto', found '2' (from",
        ),
        (TrainConfig, {"dump_of": "x"}, "own (from --dump_of and {recipe})."),
        (TrainConfig, {}, "train.ttt_steps: expected at least 1, found 0 (from {recipe})."),
        (
            CurveConfig,
            {"shares": ".1,.2"},
            "--shares: expected at least 3 values, found 2 (from --shares).",
        ),
        (
            CurveConfig,
            {"shares": ".1,.2,3"},
            "--shares.2: expected at most 1, found 3 (from --shares).",
        ),
        (
            ExportConfig,
            {"format": "x"},
            "--format: expected 'hf' or 'speculators', found 'x' (from --f",
        ),
        (
            SynthConfig,  # it may be a secret, and is not shown
            {"server_env": "HF_TOKEN=hf_x"},
            "synth.server_env: expected a mapping, found a list (from --server_env).",
        ),
        (
            SynthConfig,
            {"server_env": "{HF_TOKEN: [hf_x]}"},
            "synth.server_env.HF_TOKEN: expected text, found a list (from --server_env).",
        ),
        (
            SynthConfig,
            {"sources": "[{pth: a}]"},
            "synth.sources.0.pth: unknown key in --sources. Did you mean path?",
        ),
    ],
)
def test_a_value_is_blamed_on_who_gave_it(
    config: type[StageConfig], flags: dict[str, str], told: str, tmp_path: Path
) -> None:
    train = {"dump_of": "{follow: true}", "": "{ttt_steps: 0}"}.get(next(iter(flags), ""), "{}")
    recipe = write_recipe(tmp_path, f"run: {{target: t}}\ntrain: {train}\n")
    with pytest.raises(UserError, match=r".") as refused:
        settings.build(config, {"recipe": str(recipe), **flags})
    assert told.replace("{recipe}", str(recipe)) in refused.value.problem
    assert (str(recipe) in refused.value.problem) == ("{recipe}" in told)


def test_identity_is_what_changes_the_result() -> None:
    first = settings.build(DumpConfig, {"target": "t"}).identity()
    parallel = settings.build(DumpConfig, {"target": "t", "batch_tokens": "99", "name": "other"})
    other_vocab = settings.build(DumpConfig, {"target": "t", "draft_vocab_size": "99"})
    other_layers = settings.build(DumpConfig, {"target": "t", "aux_layers": "[1,2,3]"})
    assert parallel.identity() == first
    assert other_vocab.identity() == first  # a new draft vocabulary does not void the states
    assert other_layers.identity() != first


def test_workspace_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EYRIE_WORKSPACE", "/somewhere")
    flags = {"target": "t", "prompts": "p"}
    assert settings.build(SynthConfig, flags).workspace == Path("/somewhere")
    assert settings.build(SynthConfig, {**flags, "workspace": "x"}).workspace == Path("x")


def test_every_field_has_a_doc_and_is_marked() -> None:
    for stage in ("synth", "dump", "train", "bench"):
        module = __import__(f"stages.{stage}.config", fromlist=["config"])
        config = getattr(module, f"{stage.capitalize()}Config")
        own = set(config.model_fields) - set(configs.StageConfig.model_fields)
        assert not own & set(configs.RunConfig.model_fields), "a flag would be ambiguous"
        for name in own:
            field = config.model_fields[name]
            assert field.description, name
            assert configs.kind_of(field) in ("identity", "operational"), name


def test_print_config_tells_what_recipe_and_flags_come_to(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {target: t}\ntrain: {epochs: 5}\n")
    asked = ("train", "--recipe", str(recipe), "--ttt_steps", "2", "--print_config")
    told = run_stage(*asked, "--workspace", str(tmp_path))
    assert told.returncode == 0, told.stderr
    settings = json.loads(told.stdout)
    assert (settings["epochs"], settings["ttt_steps"], settings["beta2"]) == (5, 2, 0.95)
    assert settings["run"]["target"] == "t"
    assert list(tmp_path.iterdir()) == [recipe]  # no folder, no log: nothing was run
    assert run_stage(*asked, "--epoch", "1").returncode == 2


def test_torch_without_memory_is_no_bug_of_ours() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 50, dtype=torch.uint8)
    outcome = _outcome(raised.value)
    assert (outcome.exit_code, outcome.code) == (EXIT_USER, "out-of-memory")
    assert outcome.remedy
    assert _outcome(RuntimeError("shape mismatch")).exit_code == EXIT_BUG


def test_an_error_is_logged_in_its_parts() -> None:
    error = UserError(
        "/m: expected 36 layers,\nfound 32.",
        code="target-layers",
        remedy="Set run.target.",
        facts={"expected": 36, "found": 32},
    )
    assert format_error(error).split("\n") == [
        "[target-layers] /m: expected 36 layers, found 32.",
        "remedy: Set run.target.",
        'facts: {"expected": 36, "found": 32}',
    ]
    assert str(error) == "/m: expected 36 layers,\nfound 32. Set run.target."


class _Grouped(StageConfig):
    """Does a thing."""

    section = "train"
    groups = {"Data": "rows"}  # noqa: RUF012

    rows: Literal["few", "many"] = identity("few", "How many rows.")
    as_json: bool = pydantic.Field(False, alias="json", description="Print JSON.")


def test_help_groups_flags_and_lists_choices() -> None:
    text = help_text("train", {"run": (_Grouped, "x:y")}, "run")
    data, rest = text.split("Data:\n")[1].split("\n\nInvocation:\n")
    assert data.split("\n") == ["  * --rows few|many", "        How many rows. [default: few]"]
    assert "    --json [true|false]" in rest
    assert rest.index("--overwrite") < rest.index("Run (") < rest.index("--target ")


def test_a_boolean_flag_takes_no_word_that_follows_it() -> None:
    words = _spell_out(["--json", "name", "--overwrite", "false", "--rows", "many"], _Grouped)
    assert words == ["--json=true", "name", "--overwrite", "false", "--rows", "many"]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "x"}, "$RANK: expected a number from 0, found 'x'."),
        ({"LOCAL_RANK": "-1"}, "$LOCAL_RANK: expected a number from 0, found '-1'."),
        ({"WORLD_SIZE": "0"}, "$WORLD_SIZE: expected a number from 1, found '0'."),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "$RANK: expected less than $WORLD_SIZE, 2, found 2."),
    ],
)
def test_a_rank_that_cannot_be_is_refused(
    tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    """It names the log, before any error is caught; no flag and no recipe gives it."""
    command = [sys.executable, "-m", "stages.train", "--target", "t", "--workspace", str(tmp_path)]
    refused = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT), **variables}, capture_output=True, text=True
    )
    assert refused.returncode == EXIT_USER
    assert f"settings: {said}\n" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not any(tmp_path.iterdir())
