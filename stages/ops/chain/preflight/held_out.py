# SPDX-License-Identifier: Apache-2.0
"""Does bench ask what this run's head is trained on? Told by paths and by the content of files."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from shared.errors import UserError
from shared.io.files import sha256
from shared.prompts import sources
from shared.prompts.sources import Source
from stages.ops.chain.inputs import prompt_sources
from stages.ops.chain.processes import Step


def seen_prompts(steps: Sequence[Step]) -> Iterator[str]:
    """A warning at most: no stage fails for it, and the acceptance length says little."""
    bench = next(step for step in steps if step.stage == "bench")
    workspace = Path(bench.settings["workspace"])
    for step in steps:
        for source in prompt_sources(step) if step.stage in ("synth", "dump") else ():
            for asked in prompt_sources(bench):
                if both := _shared(asked, source, workspace):
                    yield (
                        f"bench.prompts: {both} is what {step.stage} reads too: the head is measured on "
                        "prompts that it was trained on. Hold other prompts out for bench."
                    )
                    return


def _shared(asked: Source, source: Source, workspace: Path) -> str:
    """What both read: a file, or a data set of a hub; '' where nothing is known to be."""
    on_hub = [sources.is_on_hub(each, workspace) for each in (asked, source)]
    if any(on_hub):
        same = all(on_hub) and _digest(asked, workspace) == _digest(source, workspace)
        return asked.path if same else ""
    held_out, seen = (_files(each, workspace) for each in (asked, source))
    for path in held_out:
        size = path.stat().st_size
        alike = [other for other in seen if other.stat().st_size == size]
        if any(path.samefile(other) or sha256(path) == sha256(other) for other in alike):
            return str(path)
    return ""


def _digest(source: Source, workspace: Path) -> str:
    return sources.digest(source, workspace, label="prompts")


def _files(source: Source, workspace: Path) -> list[Path]:
    try:
        return sources.find_files(source, workspace, label="prompts")
    except UserError:  # preflight says it
        return []
