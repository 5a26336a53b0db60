# SPDX-License-Identifier: Apache-2.0
"""The part of preflight that is about the head's variant: an older vLLM serves a newer head as another one.

It drops the norms of EAGLE-3.1 and the window of `draft_window` without a word; of the window no tensor
tells it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from shared.contracts.head_folder import read_head
from shared.contracts.head_variant import HeadVariant, named_variant, read_variant
from shared.errors import UserError
from shared.paths import RunPaths, find_input
from shared.vllm.versions import is_within
from stages.ops.chain.processes import Step, uses_vllm
from stages.ops.chain.served import Packages, problem, vllm_version

# The vLLM that reads a head's norms of the aux states, and its window.
_NEWER = ">=0.32"


def served_variant_problems(
    steps: Sequence[Step], paths: RunPaths, packages: Packages
) -> Iterator[str]:
    """Why bench's vLLM would measure another head than the one that it is given; one line at most."""
    by_stage = {step.stage: step for step in steps}
    bench = by_stage.get("bench")
    if bench is None or bench.done or not uses_vllm(bench):
        return
    version = vllm_version(packages("bench"))
    if not version or is_within(version, _NEWER):
        return
    train = by_stage.get("train")
    label, variant, otherwise = _measured(bench, None if train and train.done else train, paths)
    if variant is None:
        return
    has_norms = variant.fc_norm or variant.norm_output
    if has_norms or variant.window is not None:
        what = f"{variant.name if has_norms else 'a head with a window'} needs vLLM {_NEWER}"
        yield problem(
            label,
            f"a head that bench's vLLM serves; {what}",
            f"vLLM {version}",
            f"Give bench a newer vLLM (EYRIE_BENCH_PYTHON){otherwise}.",
        )


def _measured(
    bench: Step, train: Step | None, paths: RunPaths
) -> tuple[str, HeadVariant | None, str]:
    """(the setting that names bench's head, its variant where it is known, what else can be done).

    Args:
        train: where it is still to make that head.
    """
    if (given := bench.settings["head"]) is not None:
        return "bench.head", _variant_in(find_input(given, paths.workspace)), ""
    if train is None:
        return f"{paths.export}", _variant_in(paths.export), ""
    settings = train.settings
    if (given := settings["init_from"]) is not None:
        return "train.init_from", _variant_in(find_input(given, paths.workspace)), ""
    asked = named_variant(
        settings["variant"],
        settings["layer"],
        settings["draft_window"],
        settings["parallel_drafting"],
    )
    if asked.fc_norm or asked.norm_output:
        return "train.variant", asked, ", or set train.variant: eagle3 without a draft_window"
    return "train.draft_window", asked, ", or leave it out"


def _variant_in(folder: Path | None) -> HeadVariant | None:
    """Of the head in a folder; None where it is on a hub, or where another check says why it is none."""
    try:
        return read_variant(read_head(folder).config) if folder and folder.exists() else None
    except UserError:
        return None
