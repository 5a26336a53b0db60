# SPDX-License-Identifier: Apache-2.0
"""The part of preflight that is about the target: is it there, whole, and does it fit?"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.contracts import layers
from shared.errors import EyrieError, UserError
from shared.io import safetensors_files
from shared.io.safetensors_files import TensorInfo
from shared.paths import RunPaths
from shared.runtime.wording import counted
from shared.target import model as target
from shared.target.model import TargetConfig
from shared.target.templates import require_chat_template
from stages.ops.chain import sizes
from stages.ops.chain.inputs import find, targets
from stages.ops.chain.machine import Machine
from stages.ops.chain.preflight.bench import head_problems
from stages.ops.chain.preflight.bench_prompts import room_problems
from stages.ops.chain.processes import Step
from stages.ops.chain.served import Packages, problem, served_problems

# A GPU gives a model less than all of its memory: vLLM's own default share.
_GPU_SHARE = 0.9
# A target of this repository's recipes -> what makes it in the workspace.
_MADE_BY = {
    "targets/demo": "make demo",
    "targets/smollm2-quarter": "make real",
    "targets/smollm2-night": "make real TIER=night",
}


def existing_folder(paths: RunPaths) -> Path:
    """The run's folder, or where it will be made: a plan makes nothing."""
    folders = (paths.root, *paths.root.absolute().parents)
    return next(folder for folder in folders if folder.exists())


def target_problems(
    name: str, left: Sequence[Step], paths: RunPaths, machine: Machine, packages: Packages
) -> Iterator[str]:
    """What is wrong with one target of the stages that are left.

    A target on the hub is judged by its config.json and its tensors' headers.

    Args:
        packages: of a stage's interpreter; empty where they are not known.
    """
    users = [step for step in left if name in targets(step)]
    run = users[0].run
    try:
        folder, tensors = find(name, run["target_revision"], paths)
        config = target.read_config(folder, trust_remote_code=run["trust_remote_code"])
        is_whole = tensors is None
        if is_whole and any(step.stage in ("synth", "bench") for step in users):
            require_chat_template(folder, run["chat_template"], paths.workspace)
        if tensors is None:
            tensors = safetensors_files.list_tensors(folder)
    except EyrieError as error:
        yield f"{error}{_how_made(name)}"
        return
    fits = [*_fits_target(run, config)]
    yield from fits
    if not fits and any(step.stage in ("dump", "train") for step in users):
        yield from _trainable(users, config, tensors)
    if not fits:
        yield from served_problems(users, config, machine, packages)
    for step in users:
        if step.stage == "bench":
            yield from head_problems(step, config, paths.workspace)
            yield from room_problems(step, config, paths.workspace)
    yield from _memory(sizes.weight_bytes(tensors), users, machine)
    yield from _disk(left, config, paths)


def _how_made(name: str) -> str:
    """What makes one of the targets that this repository's recipes name; '' of another one."""
    command = _MADE_BY.get(name)
    return f" `{command}` makes {name}." if command else ""


def _trainable(
    users: Sequence[Step], config: TargetConfig, tensors: Mapping[str, TensorInfo]
) -> Iterator[str]:
    """What dump and train would refuse after hours: an output layer or a head that cannot be."""
    from shared.target.adapter import output_layer

    try:
        output_layer(config, tensors)
        for step in users:
            if step.stage == "train":
                sizes.head_config(step.run, config, step.settings)
    except UserError as error:
        yield str(error)


def _fits_target(run: Mapping[str, Any], config: TargetConfig) -> Iterator[str]:
    try:
        layers.resolve_aux_layers(run["aux_layers"], config.num_layers)
    except UserError as error:
        yield str(error)
    if run["draft_vocab_size"] > config.vocab_size:
        yield problem(
            "run.draft_vocab_size",
            f"at most the target's {config.vocab_size} tokens",
            str(run["draft_vocab_size"]),
            "Lower it.",
        )
    longest = config.raw.get("max_position_embeddings")  # a class's default says little
    scaling = config.raw.get("rope_scaling") or config.raw.get("rope_parameters") or {}
    if longest and "factor" not in scaling and run["max_length_tokens"] > longest:
        yield problem(
            "run.max_length_tokens",
            f"at most the target's {longest} positions",
            str(run["max_length_tokens"]),
            "Lower it.",
        )
    if _needs_own_code(config) and not run["trust_remote_code"]:
        yield problem(
            "run.trust_remote_code",
            "true, as the target runs by Python code of its own alone",
            "false",
            "Read that code, then set it; or use a version of the target that needs none.",
        )


def _needs_own_code(config: TargetConfig) -> bool:
    """Whether transformers has no code for the target, which brings some; false where none can tell."""
    if not config.raw.get("auto_map"):
        return False
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ModuleNotFoundError:
        return False
    return config.model_type not in CONFIG_MAPPING_NAMES


def _memory(weights: int, users: Sequence[Step], machine: Machine) -> Iterator[str]:
    for step in users:
        if step.stage == "train" or step.settings.get("states"):  # three tensors of it are read
            continue
        if step.settings.get("mode") == "keep":  # answers are there: no weight is read
            continue
        copies = int(step.settings.get("data_parallel") or 1)
        # One engine of transformers' spreads over all GPUs that it finds.
        spreads = step.settings.get("backend") == "hf" and copies == 1
        shared_by = len(machine.gpus) if spreads and machine.gpus else sizes.gpus_a_copy(step)
        label = f"{step.stage}'s memory"
        if not machine.gpus:
            if weights > machine.memory_bytes:
                yield problem(
                    label,
                    f"{weights / 2**30:.1f} GiB for the target's weights",
                    str(machine),
                    "Take a machine with GPUs, or a smaller target.",
                )
            continue
        if shared_by * copies > len(machine.gpus):
            yield problem(
                label,
                f"{counted(shared_by * copies, 'GPU')}, as the recipe says",
                str(machine),
                f"Lower {step.stage}.tensor_parallel_size (or data_parallel).",
            )
        room = int(machine.least_gpu_bytes * _GPU_SHARE)
        if weights // shared_by > room:
            yield problem(
                label,
                f"{weights / shared_by / 2**30:.1f} GiB a GPU for the target's weights",
                f"{room / 2**30:.1f} GiB of {machine}",
                "Take a machine with more."
                if spreads
                else f"Raise {step.stage}.tensor_parallel_size.",
            )


def _disk(left: Sequence[Step], config: TargetConfig, paths: RunPaths) -> Iterator[str]:
    try:
        needed = sizes.certain_disk_bytes(left, config, paths)
    except UserError:  # settings that do not fit the target: named already
        return
    folder = existing_folder(paths)
    free = shutil.disk_usage(folder).free
    if needed > free:
        yield problem(
            "disk",
            f"{needed / 1e9:.1f} GB free in {paths.workspace} for hidden states and checkpoints",
            f"{free / 1e9:.1f} GB",
            "Free some space, take fewer prompts, or let train read beside dump (dump.window_shards).",
        )
