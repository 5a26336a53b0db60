# SPDX-License-Identifier: Apache-2.0
"""A draft head -> what it is worth in vLLM.

In: the export, a head from elsewhere or a server that has one, and prompts that no training has
seen. Out: `report.json` and `report.html`. Cost: one engine start for the baseline and for each K
(and for ngram), and one pass over the prompts for each load on each.
"""

import functools
import itertools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.artifacts.artifact import Artifact
from shared.artifacts.checksums import require_unchanged
from shared.artifacts.manifest import require_parent
from shared.contracts.bench_report import read_report, require_comparable
from shared.contracts.head_folder import weight_files
from shared.conversations.switches import require_switches
from shared.errors import UserError
from shared.io import files
from shared.paths import require_input
from shared.prompts import sources
from shared.prompts.sources import Source
from shared.runtime.status import Accounting
from shared.target import model as target
from shared.target.templates import require_chat_template, template_inputs
from shared.target.tokenizer import tokenizer_hash
from shared.vllm.measured_rows import Conversation, check_warmup, conversation_of
from stages.bench import head_check
from stages.bench.config import BenchConfig, CompareConfig
from stages.bench.measure import plans
from stages.bench.measure.progress import Progress
from stages.bench.report import gates, limits, lineage, report
from stages.bench.report.cautions import lossy

OWN_PROMPTS = Path(__file__).with_name("prompts.jsonl")
REPORT, PAGE = "report.json", "report.html"

logger = logging.getLogger(__name__)


@dataclass
class Subject:
    """What is measured: the target's folder and the head's, both checked, or neither."""

    target: Path | None = None
    head: Path | None = None
    parents: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    drafting: dict[str, Any] = field(default_factory=dict)  # what vLLM must be told of the head
    warnings: list[str] = field(default_factory=list)

    def require_unchanged(self) -> None:
        """Refuse an export that is not what training wrote.

        Raises:
            UserError: with the file that is damaged.
        """
        if self.head is not None and (train := self.parents.get("train")):
            require_unchanged(self.head, train, train["files"])

    def measured(self) -> dict[str, Any]:
        """What was measured, by fingerprint and hash; how the head was made is `lineage`'s."""
        train = self.parents.get("train")
        known = (
            {"head_fingerprint": train["fingerprint"], "training": train["facts"]} if train else {}
        )
        return {**known, **self.inputs}

    def serving(self, config: BenchConfig) -> dict[str, Any]:
        """What a server must be told of the target; nothing of one that runs already."""
        # Here, not above: a benchmark that is done already must not wait for torch.
        from stages.bench.measure.server import target_options

        return {} if self.target is None else target_options(config, self.target)


def run(config: BenchConfig) -> None:
    """The stage, top to bottom.

    Raises:
        UserError: no finished export, no prompts, or the engine refuses the head.
        OutputError: a gate is missed; the report is written and says by how much.
        RetryableError: an engine died, or an endpoint does not answer.
    """
    subject = find_subject(config)
    prompts = config.prompts or Source(path=str(OWN_PROMPTS))
    subject.inputs["prompts"] = sources.digest(prompts, config.workspace, label="bench.prompts")
    earlier = _earlier_report(config, subject.inputs)
    artifact = Artifact(
        config.paths.stage("bench"), config, parents=subject.parents, inputs=subject.inputs
    )
    if artifact.is_done():
        return
    for warning in subject.warnings:
        logger.warning("%s", warning)
    subject.require_unchanged()
    with artifact.work() as is_needed:
        if not is_needed:
            return
        # Those of an earlier attempt, which may stay unreplaced.
        files.unlink(artifact.folder, REPORT, PAGE)
        accounting = Accounting()
        conversations = _conversations(config, prompts, accounting, artifact.folder)
        started_s = time.monotonic()
        results = _measure(config, subject, conversations, artifact.folder)
        measured_s = time.monotonic() - started_s
        result = report.build(
            config,
            results,
            measured=subject.measured(),
            warnings=subject.warnings,
            drafting=subject.drafting,
            serving=subject.serving(config),
        )
        result["seconds"] = round(measured_s, 1)
        if subject.parents:  # a head from elsewhere was not made by this run
            result["lineage"] = lineage.of_run(config.paths)
            result["limit"] = limits.find(result, is_exact=not lossy(config))
        result["gates"] = gates.judge(config, result, earlier)
        _write(result, artifact.folder)
        gates.require_met(result, artifact.folder / REPORT)
        artifact.finish(
            [REPORT, PAGE, "rejects.jsonl"],
            counts=accounting.as_dict(),
            facts=result["head"]["acceptance"],
            engine=f"vllm {result['vllm_version']}",
        )


def find_subject(config: BenchConfig) -> Subject:
    """The target and the head, checked before any engine starts; neither for an endpoint.

    Raises:
        UserError: missing, of another target, or certain to be misread by vLLM.
    """
    if config.endpoint:
        return Subject(inputs={"endpoint": config.endpoint})
    subject = Subject()
    if config.head is None:
        export = config.paths.export
        subject.parents["train"] = require_parent(export, stage="train", config=config)
        subject.head = export
    else:
        subject.head = target.locate(
            config.head,
            config.workspace,
            revision=config.head_revision,
            label="bench.head",
            is_head=True,
        )
        subject.inputs["head"] = target.weights_hash(subject.head, weight_files(subject.head))
    lineage.require_same_template(subject.head, config)
    folder = target.locate(config.run.target, config.workspace, revision=config.run.target_revision)
    require_chat_template(folder, config.run.chat_template, config.workspace)
    require_switches(folder, config.run, config.workspace)
    subject.inputs |= template_inputs(folder, config.run, config.workspace)
    subject.target = folder
    subject.inputs["target"] = target.weights_hash(folder)
    subject.inputs["tokenizer"] = tokenizer_hash(folder)
    subject.warnings = head_check.check(subject.head, target.read_config(folder))
    subject.drafting = head_check.needed_settings(subject.head)
    return subject


def _earlier_report(config: BenchConfig, inputs: dict[str, str]) -> dict[str, Any] | None:
    """The report to compare this run with, which becomes one of its inputs."""
    if config.earlier_report is None:
        return None
    path = require_input(config.earlier_report, config.workspace, label="bench.earlier_report")
    earlier = read_report(path)
    require_comparable(earlier, config.model_dump(mode="json"), inputs["prompts"], path)
    inputs["earlier_report"] = files.sha256(path)
    return earlier


def _conversations(
    config: BenchConfig, prompts: Source, accounting: Accounting, folder: Path
) -> list[Conversation]:
    read = sources.read_source(prompts, config.workspace, label="bench.prompts")
    rows = sources.usable(sources.without_duplicates(read), accounting)
    found = [conversation_of(row) for row in itertools.islice(rows, config.max_prompts)]
    accounting.ok = len(found)
    rejects = folder / "rejects.jsonl"
    accounting.write_rejects(rejects)
    accounting.check_input(
        usable=len(found), max_failed_fraction=0.0, label=prompts.path, rejects=rejects
    )
    check_warmup(found)
    return found


def _measure(
    config: BenchConfig, subject: Subject, conversations: list[Conversation], folder: Path
) -> dict[str, dict[str, Any]]:
    """One engine after another; the raw measurement under each engine's name."""
    # Here, not above: a benchmark that is done already must not wait for the client.
    from stages.bench.measure import measurement

    plan = plans.plan_of(config, subject.target, conversations)
    drafters = plans.drafters_of(config, subject.head, subject.drafting)
    if subject.head is not None:
        head_check.check_numbers(subject.head)
    progress = Progress(config.paths.status("bench"), plan, len(drafters))
    results: dict[str, dict[str, Any]] = {}
    for name, speculative in drafters.items():
        progress.begins(name)
        heads = {key: raw for key, raw in results.items() if key.startswith("head")}
        others = heads if name == "baseline" else {}
        check = None
        if name == "head" and subject.head is not None:  # the first engine: nothing runs before it
            check = functools.partial(
                head_check.check_in_vllm, plan, subject.head, speculative or {}, folder / "raw"
            )
        results[name] = measurement.measure(
            plan,
            name,
            speculative,
            folder,
            others=others,
            on_answered=progress.answered,
            while_starting=check,
        )
    return results


def _write(result: Mapping[str, Any], folder: Path) -> None:
    # Here, not above: a benchmark that is done already must not wait for matplotlib.
    from stages.bench.report import html, terminal

    page = html.render(result)
    files.write_json(folder / REPORT, result)
    files.write_text(folder / PAGE, page)
    terminal.show(result)


def compare(config: CompareConfig) -> None:
    """Two reports side by side, in the terminal and on a page.

    Raises:
        UserError: one of them is no bench report.
    """
    from stages.bench.report import html, terminal

    first, second = (
        read_report(_report_path(name, config.workspace)) for name in (config.first, config.second)
    )
    terminal.compare(first, second)
    files.write_text(config.out, html.render_comparison(first, second))
    logger.info("the page: %s", config.out)


def _report_path(name: str, workspace: Path) -> Path:
    """The report that a run's name, a bench folder or a file means."""
    candidates = [workspace / name / "bench" / REPORT, Path(name) / "bench" / REPORT]
    candidates += [workspace / name / REPORT, Path(name) / REPORT, workspace / name, Path(name)]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"expected a run's name, a bench folder or a report.json, found nothing for {name!r} in "
        f"{workspace} or here.",
        code="report-missing",
        remedy="Run bench first, or give the report's path.",
        facts={"name": name},
    )
