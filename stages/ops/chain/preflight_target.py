# SPDX-License-Identifier: Apache-2.0
"""The part of preflight that is about the target: is it there, whole, and does it fit?"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.contracts import layers
from shared.errors import EyrieError, UserError
from shared.paths import RunPaths, find_input
from shared.target import model as target
from shared.target.model import TargetConfig
from shared.target.tokenizer import require_chat_template
from stages.ops.chain import sizes
from stages.ops.chain.machine import Machine
from stages.ops.chain.processes import Step

# A GPU gives a model less than all of its memory: vLLM's own default share.
_GPU_SHARE = 0.9
_HUB_TIMEOUT_S = 10.0


def problem(label: str, expected: str, found: str, remedy: str) -> str:
    """One line: what was expected, what was found, what to do."""
    return f"{label}: expected {expected}, found {found}. {remedy}"


def existing_place(paths: RunPaths) -> Path:
    """The run's folder, or where it will be made: a plan makes nothing."""
    folders = (paths.root, *paths.root.absolute().parents)
    return next(folder for folder in folders if folder.exists())


def targets(step: Step) -> Iterator[str]:
    """The targets that a stage loads."""
    if step.settings.get("endpoints") or step.settings.get("endpoint"):
        return
    original = step.run["target_train"] if step.stage in ("dump", "train") else None
    yield original or step.run["target"]


def target_problems(
    name: str, left: Sequence[Step], paths: RunPaths, machine: Machine
) -> Iterator[str]:
    """What is wrong with one target of the stages that are left."""
    users = [step for step in left if name in targets(step)]
    run = users[0].run
    folder = find_input(name, paths.workspace)
    if folder is None:
        folder, problem = _from_hub(name, run["target_revision"])
        if folder is None:
            if problem:
                yield problem
            return
    try:
        config = target.read_config(folder)
        if any(step.stage in ("synth", "bench") for step in users):
            require_chat_template(folder)
    except EyrieError as error:
        yield str(error)
        return
    yield from _fits_target(run, config)
    yield from _memory(folder, users, machine)
    yield from _disk(left, config, paths)


def _from_hub(name: str, revision: str | None) -> tuple[Path | None, str]:
    """(its folder in the cache, what is wrong); neither where it can be fetched."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        expected = "a model's folder in the workspace or here, or a hub id (organisation/name)"
        return None, problem("run.target", expected, name, "Correct the recipe.")
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    try:
        kept = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
        return Path(kept), ""
    except hub.LocalEntryNotFoundError:
        pass
    except hub.HFValidationError as error:
        return None, problem("run.target", "a folder or a hub id", name, str(error))
    if constants.HF_HUB_OFFLINE:
        remedy = "Fill the cache (HF_HOME) beforehand, or unset HF_HUB_OFFLINE."
        return None, problem("run.target", f"{name} in the hub's cache", "none, offline", remedy)
    try:
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT_S)
    except (hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        remedy = "Correct the name, or give HF_TOKEN where it is private."
        return None, problem("run.target", f"{name} on the hub", str(error).split("\n")[0], remedy)
    except (hub.HfHubHTTPError, OSError) as error:
        remedy = "Check the network, or fill the cache (HF_HOME) beforehand."
        return None, problem("run.target", f"the hub, for {name}", type(error).__name__, remedy)
    return None, ""


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
    longest = config.raw.get("max_position_embeddings")
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


def _memory(folder: Path, users: Sequence[Step], machine: Machine) -> Iterator[str]:
    weights = sizes.weight_bytes(folder)
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
                f"{shared_by * copies} GPUs, as the recipe says",
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
    place = existing_place(paths)
    free = shutil.disk_usage(place).free
    if needed > free:
        yield problem(
            "disk",
            f"{needed / 1e9:.1f} GB free in {paths.workspace} for hidden states and checkpoints",
            f"{free / 1e9:.1f} GB",
            "Free some space, or take fewer prompts.",
        )
