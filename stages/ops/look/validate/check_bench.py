# SPDX-License-Identifier: Apache-2.0
"""Is the report bench's, of this head, true to its own counters, and above its gates?"""

import re

from shared.contracts.bench_report import read_report
from stages.ops.look.validate.artifacts import RunView
from stages.ops.look.validate.findings import Wrong

_TOLERANCE = 1e-9
_FROM_ELSEWHERE = re.compile(r"""<(script|img|link|iframe)[^>]+(src|href)=["']?https?:[^>]*>""")


def ask_gates(run: RunView) -> str:
    """Every gate is met, the acceptance length's by the limit that the recipe set."""
    path = run.paths.report
    report = read_report(path)
    for gate in report["gates"]:
        if not gate["met"]:
            raise Wrong(
                f"{path}: {gate['name']} is {gate['value']}, the gate asks for at {gate['bound']} "
                f"{gate['limit']}."
            )
    length = float(report["head"]["acceptance"]["acceptance_length"])
    minimum = run.manifest("bench")["config"]["min_acceptance_length"]
    if not length >= minimum:
        raise Wrong(
            f"{path}: acceptance length {length:.3f} is under bench.min_acceptance_length {minimum}."
        )
    return f"acceptance length {length:.3f}, gate {minimum}, {len(report['gates'])} gates met"


def ask_figures(run: RunView) -> str:
    """The acceptance length follows from the counters, and is the manifest's."""
    path = run.paths.report
    head = read_report(path)["head"]
    counters, recorded = head["counters"], head["acceptance"]
    drafts, accepted = counters["num_drafts"], counters["num_accepted_tokens"]
    if sum(counters["num_accepted_tokens_per_pos"]) != accepted:
        raise Wrong(f"{path}: accepted tokens by position do not sum to {accepted}.")
    length = 1 + accepted / drafts
    if abs(length - recorded["acceptance_length"]) > _TOLERANCE:
        raise Wrong(
            f"{path}: says acceptance length {recorded['acceptance_length']}, its counters {length}."
        )
    facts = run.manifest("bench")["facts"]
    if facts["acceptance_length"] != recorded["acceptance_length"]:
        raise Wrong(
            f"{path}: says acceptance length {recorded['acceptance_length']}, the manifest "
            f"{facts['acceptance_length']}."
        )
    return f"{accepted} accepted in {drafts} drafts"


def ask_head(run: RunView) -> str:
    """What was measured is the head that lies in export/."""
    measured = read_report(run.paths.report)["measured"].get("head_fingerprint")
    if measured is None:
        return "a head from elsewhere, or an endpoint's"
    export = run.manifest("export")["fingerprint"]
    if measured != export:
        raise Wrong(
            f"{run.paths.report}: measured the head {measured[:12]}, export/ holds {export[:12]}. "
            "Run bench again with --overwrite."
        )
    return f"head {measured[:12]}"


def ask_page(run: RunView) -> str:
    """The page is there, whole, and loads nothing."""
    path = run.folder("bench") / "report.html"
    text = path.read_text(encoding="utf-8")
    if not text.startswith("<!doctype html>") or "</html>" not in text:
        raise Wrong(f"{path}: expected a whole page.")
    if found := _FROM_ELSEWHERE.search(text):
        raise Wrong(f"{path}: expected a page that needs no network, found {found[0]}.")
    return f"{len(text)} characters"
