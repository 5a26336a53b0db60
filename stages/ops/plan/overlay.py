# SPDX-License-Identifier: Apache-2.0
"""A plan as a Kubernetes overlay: the Jobs of `compose/k8s/base`, sized for the target.

In: a plan, the GPU type, how many nodes there are. Out: a folder with `kustomization.yaml`, the recipe
that it makes a ConfigMap of, and `storage.yaml` for the claims, which is applied once and by itself: a
run's name must not rename the data's home. Sizes are computed, as all of a plan is.
"""

import dataclasses
import math
import os
import re
from pathlib import Path

import jinja2
import yaml
from rich import filesize

from shared.errors import UserError
from shared.io.files import printable
from shared.runtime.wording import counted
from stages.ops.chain import sizes
from stages.ops.chain.processes import SOURCE_ROOT
from stages.ops.config import PlanConfig
from stages.ops.plan.model import Plan
from stages.ops.plan.output import recipe, row_tokens, run_name

_K8S = SOURCE_ROOT / "compose" / "k8s"
_GIB = 2**30
# Ranks and engine processes exchange tensors there; it counts as the container's memory.
_ENGINE_SHM_GIB = 16
_RANK_SHM_GIB = 8
# The interpreter, the engine's own host memory, tokenizers, rows on their way.
_PROCESS_GIB = 32
# Checkpoints, answers and reports beside the states, and what a full file system does to a network one.
_SPARE = 1.25
_ARM_HOSTS = ("GB200",)
_LONGEST_SUFFIX = 40  # a Job's name has 63 characters, of which pods take some


@dataclasses.dataclass(frozen=True)
class Pod:
    """What one pod of a stage is given.

    Attributes:
        shards: pods that share the stage's work; 1 where the stage is one pod.
    """

    gpus: int
    shards: int
    cpus: int
    memory_gib: int
    shm_gib: int


def pods(plan: Plan, gpu: str, nodes: int) -> dict[str, Pod]:
    """Each stage's pods on so many nodes of one GPU type.

    Raises:
        UserError: a stage needs more than a node, and the Jobs are of one node each.
    """
    if plan.weights.bytes is None:
        raise UserError(
            f"--overlay: the size of {plan.model}'s weights is unknown.",
            code="plan-size-unknown",
            remedy="Give a folder or a hub id with its safetensors files.",
            facts={"model": plan.model},
        )
    placement = plan.placements[gpu]
    a_node = placement.gpus_a_node
    dump_gpus = placement.hf_gpus or placement.tensor_parallel
    if not placement.copies or dump_gpus > a_node:
        raise UserError(
            f"--overlay: expected a target that one node of {a_node} x {gpu} holds, found "
            f"{filesize.decimal(plan.weights.bytes)} of weights.",
            code="plan-target-too-large",
            remedy="Choose a larger --gpu type.",
            facts={"weight_bytes": plan.weights.bytes, "gpu": gpu},
        )
    split = placement.tensor_parallel
    return {
        "synth": _engine(plan, split, nodes * (a_node // split)),
        "dump": _engine(plan, dump_gpus, nodes * (a_node // dump_gpus)),
        "train": Pod(a_node, 1, 12 * a_node, *_memory(a_node, plan, is_train=True)),
        "bench": _engine(plan, split, 1),
    }


def _engine(plan: Plan, gpus: int, shards: int) -> Pod:
    return Pod(gpus, shards, max(16, 8 * gpus), *_memory(gpus, plan, is_train=False))


def _memory(gpus: int, plan: Plan, *, is_train: bool) -> tuple[int, int]:
    """(memory, the part of it that is /dev/shm), GiB."""
    shm = max(_ENGINE_SHM_GIB, _RANK_SHM_GIB * gpus) if is_train else _ENGINE_SHM_GIB
    # An engine reads the weights through this memory; a rank holds its state here while it saves it.
    held = gpus * sizes.train_bytes(plan.head) if is_train else plan.weights.bytes or 0
    needed = shm + _PROCESS_GIB + held / _GIB
    return 16 * math.ceil(needed / 16), shm


def texts(plan: Plan, config: PlanConfig, folder: Path) -> dict[Path, str]:
    """The overlay's files in `folder`, and what is to stand in them.

    Raises:
        UserError: this is no checkout, or the target needs more than a node.
    """
    if not (_K8S / "base").is_dir():
        raise UserError(
            f"--overlay: expected the manifests in {_K8S}, found none.",
            code="plan-no-checkout",
            remedy="Run this from a checkout.",
        )
    found = pods(plan, config.gpu, config.nodes)
    base = os.path.relpath(_K8S / "base", folder.absolute())
    return {
        folder / "recipe.yaml": recipe(plan, config, sharded=True),
        folder / "storage.yaml": _storage(plan, config),
        folder / "kustomization.yaml": _kustomization(plan, config, found, base),
    }


def _kustomization(plan: Plan, config: PlanConfig, found: dict[str, Pod], base: str) -> str:
    suffix = re.sub(r"[^a-z0-9]+", "-", run_name(plan, config).lower()).strip("-")
    template = Path(__file__).with_name("kustomization.yaml.j2")
    return jinja2.Template(template.read_text(encoding="utf-8"), trim_blocks=True).render(
        title=printable(
            f"{plan.model} on {counted(config.nodes, 'node')} of {config.gpu}, as planned."
        ),
        suffix=suffix[:_LONGEST_SUFFIX].strip("-") or "run",
        base=base,
        is_arm=config.gpu in _ARM_HOSTS,
        pods=found,
    )


def _storage(plan: Plan, config: PlanConfig) -> str:
    """The shipped claims, as large as this run needs them."""
    length = row_tokens(plan, config)
    sizes_gib = {
        "eyrie-workspace": _claim(plan.disk_bytes(config.samples, length)),
        "eyrie-models": _claim(plan.weights.bytes or 0),
    }
    objects = list(yaml.safe_load_all((_K8S / "storage.yaml").read_text(encoding="utf-8")))
    for each in objects:
        if each["kind"] == "PersistentVolumeClaim":
            size = sizes_gib[each["metadata"]["name"]]
            each["spec"]["resources"]["requests"]["storage"] = f"{size}Gi"
    head = "# SPDX-License-Identifier: Apache-2.0\n# Applied once; a claim that is there already stays.\n\n"
    return head + yaml.safe_dump_all(objects, sort_keys=False)


def _claim(num_bytes: int) -> int:
    """GiB to ask for, in steps of ten."""
    return 10 * math.ceil(num_bytes * _SPARE / _GIB / 10)
