# SPDX-License-Identifier: Apache-2.0
"""The part of preflight that is about bench: its head, and the report that it is held against.

Each is what bench would refuse by its own check, after the other stages have worked.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from shared.contracts.bench_report import read_report, require_comparable
from shared.contracts.head_folder import draft_token_ids, read_head, require_fc, require_mask
from shared.errors import UserError
from shared.paths import RunPaths, find_input, require_input
from shared.prompts import sources
from shared.target.hub import require_id
from shared.target.model import TargetConfig
from shared.vllm.measured_rows import check_warmup
from stages.ops.chain.preflight.bench_prompts import LABEL, conversations_of, prompts_of
from stages.ops.chain.processes import Step
from stages.ops.chain.served import problem, said


def bench_problems(bench: Step, paths: RunPaths, *, is_made: bool) -> Iterator[str]:
    """What bench names and is not there, or cannot be measured.

    Args:
        is_made: whether this chain makes the run's export.
    """
    yield from said(lambda: _require_report(bench, paths.workspace))
    yield from said(lambda: _require_head(bench, paths, is_made=is_made))
    yield from said(lambda: check_warmup(conversations_of(bench, paths.workspace)))


def _require_report(bench: Step, workspace: Path) -> None:
    if (name := bench.settings["earlier_report"]) is None:
        return
    path = require_input(name, workspace, label="bench.earlier_report")
    earlier, digest = read_report(path), None
    with contextlib.suppress(UserError):  # no such prompts: told already
        source = prompts_of(bench, workspace)
        digest = sources.digest(source, workspace, label=LABEL) if source else None
    require_comparable(earlier, bench.settings, digest, path)


def _require_head(bench: Step, paths: RunPaths, *, is_made: bool) -> None:
    """Refuse a head that is not there; one on the hub is bench's to find.

    Args:
        is_made: whether this chain makes the run's export.
    """
    name = bench.settings["head"]
    if name is None:
        return
    folder = find_input(name, paths.workspace)
    if folder is not None:
        head = read_head(folder)
        require_fc(head)
        require_mask(head)
        return
    own = paths.export.absolute()
    if not (is_made and own in ((paths.workspace / name).absolute(), Path(name).absolute())):
        require_id(name, paths.workspace, label="bench.head", is_head=True)


def head_problems(bench: Step, config: TargetConfig, workspace: Path) -> Iterator[str]:
    """Why a head in a folder is not one of this target."""
    name = bench.settings["head"]
    folder = find_input(name, workspace) if name is not None else None
    if folder is None:
        return
    try:
        head = read_head(folder)
    except UserError:  # `bench_problems` says it
        return
    found = (head.config["vocab_size"], head.target_hidden_size)
    expected = (config.vocab_size, config.hidden_size)
    if found == expected:
        yield from said(lambda: draft_token_ids(head, config.vocab_size))
        return
    yield problem(
        f"bench.head {folder}",
        f"a head for {config.folder} (vocabulary, hidden size {expected})",
        str(found),
        "Measure it with its own target.",
    )
