# SPDX-License-Identifier: Apache-2.0
"""The Slurm scripts, run with a stand-in srun that runs the stage on this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SLURM = ROOT / "compose" / "slurm"
# Records its words. With $CODE it ends with that; else it runs the command without the container, its
# paths those of the host, as the mounts say.
SRUN = f"""#!{sys.executable}
import os, signal, sys, time
words = sys.argv[1:]
with open(os.environ["SPY"], "a") as log:
    log.write(" ".join(["srun", *words]) + "\\n")
if os.environ.get("CODE") == "term":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with open(os.environ["SPY"], "a") as log:
        log.write("ready\\n")
    time.sleep(60)
if os.environ.get("CODE"):
    sys.exit(int(os.environ["CODE"]))
mounts = next(word.partition("=")[2] for word in words if word.startswith("--container-mounts="))
hosts = dict(each.split(":")[1::-1] for each in mounts.split(","))
command = words[words.index("--") + 1 :]
command = [hosts.get(word, word) for word in command]
os.environ["EYRIE_WORKSPACE"] = hosts["/workspace"]
os.chdir({str(ROOT)!r})
os.execvp({sys.executable!r}, [{sys.executable!r}, *command[1:]])
"""
OTHER = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$SPY"
[[ $(basename "$0") == sbatch ]] && grep -c sbatch "$SPY"
[[ $* == *"show job"* ]] && echo "JobId=7 JobState=${STATE:-RUNNING} Reason=None"
exit 0
"""


class Machine:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spy = folder / "spy.txt"
        binaries = folder / "bin"
        binaries.mkdir()
        (folder / "workspace").mkdir()
        for name, text in {"srun": SRUN, "scontrol": OTHER, "sbatch": OTHER}.items():
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text("run: {name: r, target: t}\n")
        self.environment = {
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "SPY": str(self.spy),
            "RECIPE": str(self.recipe),
            "EYRIE_WORKSPACE": str(folder / "workspace"),
            "SLURM_JOB_ID": "7",
            **{
                f"EYRIE_IMAGE_{stage}": f"registry/{stage}"
                for stage in ("SYNTH", "DUMP", "TRAIN", "BENCH")
            },
        }

    def start(self, **variables: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", str(SLURM / "stage.sbatch")],
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **variables: str) -> tuple[int, str]:
        process = self.start(**variables)
        _, complaint = process.communicate(timeout=120)
        return process.returncode, complaint

    def told(self) -> str:
        return self.spy.read_text() if self.spy.exists() else ""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_stages_own_exit_code_is_the_jobs(machine: Machine) -> None:
    """train for real, where dump has not run."""
    code, complaint = machine.run(STAGE="train")
    assert code == 2
    assert "python -m stages.dump" in complaint
    assert "--container-image=registry/TRAIN" in machine.told()
    assert "scontrol" not in machine.told()


@pytest.mark.parametrize("code", [0, 2, 3, 75, 143, 137, 1])
def test_what_is_worth_another_try_is_queued_again(machine: Machine, code: int) -> None:
    assert machine.run(STAGE="synth", CODE=str(code))[0] == code
    assert ("scontrol requeue 7" in machine.told()) == (code not in (0, 2, 3))


def test_it_is_queued_again_six_times_and_no_more(machine: Machine) -> None:
    assert machine.run(STAGE="synth", CODE="75", SLURM_RESTART_COUNT="6")[0] == 75
    assert "requeue" not in machine.told()


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_cancelled_job_stays_cancelled(machine: Machine, state: str) -> None:
    code, complaint = machine.run(STAGE="train", CODE="143", STATE=state)
    assert code == 143
    assert "not queued again" in complaint and "requeue" not in machine.told()


def test_a_shard_of_an_array(machine: Machine) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    machine.run(STAGE="synth", CODE="75", **array)
    assert "--num_shards 16" in machine.told()
    assert "scontrol requeue 9_3" in machine.told()


def test_apptainer_runs_the_same_command(machine: Machine) -> None:
    assert machine.run(STAGE="bench", CODE="0", EYRIE_RUNTIME="apptainer")[0] == 0
    assert "apptainer exec --nv --no-home --bind" in machine.told()
    assert "stages.bench --recipe /etc/eyrie/recipe.yaml" in machine.told()
    assert machine.run(STAGE="bench", CODE="0", EYRIE_RUNTIME="podman")[0] == 2


# An apptainer that runs the command here, with the job's environment, from the image's working folder.
APPTAINER = """#!/usr/bin/env bash
while [[ $1 != bash ]]; do shift; done
[[ "$1 $2" == "bash -c" ]] || exit 9
bash -c "${3/cd \\/app/cd \\/}" "${@:4:1}" env >> "$SPY"
"""
SRUN_OF_APPTAINER = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 && $2 == apptainer ]] && SLURM_NODEID=3 exec "${@:2}"
"""


def test_an_apptainer_sees_the_containers_paths_and_not_the_jobs(machine: Machine) -> None:
    for name, text in {"srun": SRUN_OF_APPTAINER, "apptainer": APPTAINER}.items():
        (machine.folder / "bin" / name).write_text(text)
        (machine.folder / "bin" / name).chmod(0o755)
    job = {"PYTHONPATH": "/opt/modules/python", "HF_HOME": "/home/me/hub"}
    code, complaint = machine.run(STAGE="bench", EYRIE_RUNTIME="apptainer", **job)
    assert code == 0, complaint
    seen = dict(line.split("=", 1) for line in machine.told().splitlines() if "=" in line)
    assert seen["EYRIE_WORKSPACE"] == "/workspace"
    assert (seen["HF_HOME"], seen["PYTHONPATH"]) == ("/models", "/app")
    assert seen["EYRIE_NODE_RANK"] == "3"


def test_sigterm_reaches_the_stage_which_is_queued_again(machine: Machine) -> None:
    process = machine.start(STAGE="train", CODE="term")
    while "ready" not in machine.told():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert "scontrol requeue 7" in machine.told()


@pytest.mark.parametrize("missing", ["STAGE", "RECIPE", "EYRIE_WORKSPACE", "EYRIE_IMAGE_SYNTH"])
def test_what_is_missing_is_named(machine: Machine, missing: str) -> None:
    code, complaint = machine.run(**{"STAGE": "synth", "CODE": "0", missing: ""})
    assert code == 2 and missing in complaint
    assert machine.told() == ""


def test_a_recipe_that_is_not_there_is_named(machine: Machine) -> None:
    code, complaint = machine.run(STAGE="synth", RECIPE="recipes.yaml")
    assert code == 2 and "found none at" in complaint and "recipes.yaml" in complaint
    assert machine.told() == ""


def chain(machine: Machine, recipe: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [SLURM / "chain.sh", recipe, "--partition=gpu"],
        env={**machine.environment, **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("missing", ["EYRIE_WORKSPACE", "EYRIE_IMAGE_BENCH", "recipe"])
def test_a_chain_that_would_fail_later_submits_nothing(machine: Machine, missing: str) -> None:
    if missing == "recipe":
        machine.recipe.unlink()
    done = chain(machine, machine.recipe, **({} if missing == "recipe" else {missing: ""}))
    assert done.returncode == 2 and missing in done.stderr
    assert machine.told() == ""


def test_a_chain_waits_stage_by_stage(machine: Machine) -> None:
    done = chain(machine, machine.recipe, SHARDS="4")
    assert done.returncode == 0, done.stderr
    submitted = machine.told().splitlines()
    assert [
        f"STAGE={s}" in line
        for s, line in zip(("synth", "dump", "train", "bench"), submitted, strict=True)
    ]
    assert ["--array=0-3" in line for line in submitted] == [True, True, False, False]
    assert ["afterok:" in line for line in submitted] == [False, True, True, True]
    assert "afterok:1 " in submitted[1] and all("--partition=gpu" in line for line in submitted)


def test_a_chain_over_nodes(machine: Machine) -> None:
    """Two shards of four GPUs fit on a node of eight; train alone takes several nodes."""
    done = chain(machine, machine.recipe, SHARDS="4", SHARD_GPUS="4", TRAIN_NODES="8")
    assert done.returncode == 0, done.stderr
    submitted = machine.told().splitlines()
    halves = ["--gpus-per-node=4 --cpus-per-task=48" in line for line in submitted]
    assert halves == [True, True, False, False]
    assert ["--nodes=8" in line for line in submitted] == [False, False, True, False]


def test_the_rest_of_a_chain(machine: Machine) -> None:
    done = chain(machine, machine.recipe, STAGES="train bench")
    assert done.returncode == 0, done.stderr
    train, bench = machine.told().splitlines()
    assert "STAGE=train" in train and "afterok" not in train
    assert "STAGE=bench" in bench and "afterok:1 " in bench


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SHARDS", "0"),
        ("SHARDS", "four"),
        ("SHARD_GPUS", "-1"),
        ("TRAIN_NODES", "1.5"),
        ("STAGES", "train,bench"),
        ("STAGES", "dump synth"),
    ],
)
def test_a_chain_of_wrong_numbers_submits_nothing(machine: Machine, name: str, value: str) -> None:
    done = chain(machine, machine.recipe, **{name: value})
    assert done.returncode == 2 and f"{name}: expected " in done.stderr and value in done.stderr
    assert machine.told() == ""
