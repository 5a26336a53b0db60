# SPDX-License-Identifier: Apache-2.0
"""A head in service, and traffic -> a head that fits the traffic, if vLLM says that it is the better one.

In: a recipe, any head that train can start from, the traffic. Out: a run like any other, whose `export/`
is the new head; a run `<name>-before` with the old head's report on the same held-out rows; `adapt.json`
with both acceptance lengths. The old head is only read. Cost: the four stages on the traffic's rows and
one more bench. What is done already takes a second.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import yaml

from shared.config import RunConfig
from shared.contracts.head_folder import Head, read_head
from shared.errors import EXIT_DONE, OutputError, UserError
from shared.io import files
from shared.paths import STAGES, RunPaths
from shared.recipe import read_recipe
from shared.target import model as target
from stages.ops.adapt import traffic
from stages.ops.chain import processes
from stages.ops.chain import run as chain
from stages.ops.config import AdaptConfig, RunChainConfig

# bench's own gates are for a head by itself; here the new head is compared with the old one.
_NO_GATES = {"min_acceptance_length": 0, "min_gain_over_ngram": None, "min_speedup": None}

logger = logging.getLogger(__name__)

Recipe = dict[str, dict[str, Any]]


def run(config: AdaptConfig) -> int:
    """Adapt the head; returns the exit code of the stage that failed, or 0.

    Raises:
        UserError: the traffic, the head or the recipe does not fit.
        OutputError: the new head is not better.
    """
    recipe = read_recipe(config.recipe)
    after = processes.run_paths(config.recipe, config.workspace)
    before = RunPaths(config.workspace, f"{after.run_name}-before")
    template_kwargs = _template_kwargs(config, after)  # bench has read the whole recipe by then
    head = _old_head(config, after)
    rows = traffic.split(
        config.traffic,
        config.workspace,
        after.root / "traffic",
        max_rows=config.max_rows,
        template_kwargs=template_kwargs,
    )
    _write(before, _recipe_before(recipe, before, head, rows))
    _write(after, _recipe_after(recipe, after, head, rows))
    measure_old, make_new = _chain(config, before, ("bench",)), _chain(config, after)
    chain.look_ahead(make_new, after)  # before the old head is measured: train may not take it
    if config.dry_run:
        return EXIT_DONE
    for each in (measure_old, make_new):
        if (code := chain.run(each)) != EXIT_DONE:
            return code
    result = _compare(before, after, config.min_gain)
    result |= _vocabulary_shares(head, after) | {
        "rows": rows.counts,
        "head_before": str(head.folder),
        "head_after": str(after.export),
    }
    files.write_json(after.root / "adapt.json", result)
    gained = f"acceptance_length={result['before']:.2f}->{result['after']:.2f}"
    held = [f"{result[name]:.2%}" for name in ("vocabulary_share_before", "vocabulary_share_after")]
    logger.info("the draft vocabulary holds of the new answers: %s before, %s after", *held)
    if not result["improved"]:
        raise OutputError(
            f"{after.run_name}: expected a gain of {config.min_gain:.0%} or more, found {gained}. Keep "
            f"the old head, {head.folder}.",
            code="adapt-no-gain",
            remedy="Give more traffic, or raise train.epochs or train.learning_rate in the recipe. Where "
            "the vocabulary holds little of the answers (vocabulary_share_after), train a new head.",
            facts=result,
        )
    sys.stdout.write(f"{after.run_name}: {gained} head={after.export} report={after.report}\n")
    return EXIT_DONE


def _template_kwargs(config: AdaptConfig, paths: RunPaths) -> dict[str, Any]:
    """The switches of the chat template in this run.

    Raises:
        UserError: the recipe is not valid.
    """
    asked = RunChainConfig.model_validate(config.model_dump(include={"recipe", "workspace"}))
    (step,) = processes.steps(asked, ["bench"], paths)
    return RunConfig(**step.run).template_kwargs


def _old_head(config: AdaptConfig, paths: RunPaths) -> Head:
    """The head that is in service.

    Raises:
        UserError: there is none, or this run would overwrite it.
    """
    folder = target.locate(
        config.head, config.workspace, revision=config.head_revision, label="--head"
    )
    if folder.resolve().is_relative_to(paths.root.resolve()):
        raise UserError(
            f"--head: expected a head outside the run {paths.run_name}, which writes its own head, "
            f"found {folder}.",
            code="adapt-own-head",
            remedy="Give the recipe another run.name.",
            facts={"head": str(folder)},
        )
    return read_head(folder)


def _recipe_before(recipe: Recipe, paths: RunPaths, head: Head, rows: traffic.Split) -> Recipe:
    only_the_head = {"compare_baseline": False, "compare_ngram": False, "max_wrong_answers": None}
    bench = _bench(recipe, paths, rows) | only_the_head
    bench["head"] = _within(paths, head.folder)
    return {"run": _run_section(recipe, paths, head), "bench": bench}


def _recipe_after(recipe: Recipe, paths: RunPaths, head: Head, rows: traffic.Split) -> Recipe:
    return {
        "run": _run_section(recipe, paths, head),
        "synth": {**recipe.get("synth", {}), "prompts": _within(paths, rows.train)},
        "dump": recipe.get("dump", {}),
        "train": {
            "init_vocabulary": "redraw",
            **recipe.get("train", {}),
            "init_from": _within(paths, head.folder),
        },
        "bench": _bench(recipe, paths, rows),
    }


def _run_section(recipe: Recipe, paths: RunPaths, head: Head) -> dict[str, Any]:
    """The recipe's, with the settings that a warm start takes over from the head."""
    section = {**recipe["run"], "name": paths.run_name, "draft_vocab_size": head.draft_vocab_size}
    if head.aux_layers:
        section.setdefault("aux_layers", head.aux_layers)
    return section


def _bench(recipe: Recipe, paths: RunPaths, rows: traffic.Split) -> dict[str, Any]:
    return {**recipe.get("bench", {}), **_NO_GATES, "prompts": _within(paths, rows.held_out)}


def _within(paths: RunPaths, path: Path) -> str:
    """Relative to the workspace where it lies there, so that the recipe holds in a container too."""
    path, workspace = path.absolute(), paths.workspace.absolute()
    return str(path.relative_to(workspace) if path.is_relative_to(workspace) else path)


def _write(paths: RunPaths, recipe: Recipe) -> None:
    files.write_text(paths.recipe, yaml.safe_dump(recipe, sort_keys=False))


def _chain(config: AdaptConfig, paths: RunPaths, only: tuple[str, ...] = STAGES) -> RunChainConfig:
    shared = config.model_dump(include={"workspace", "overwrite", "dry_run"})
    return RunChainConfig.model_validate({**shared, "recipe": paths.recipe, "only": only})


def _vocabulary_shares(head: Head, after: RunPaths) -> dict[str, float]:
    """Share of the new answers' tokens that the old head can propose, and the new one.

    Raises:
        UserError: dump's counts or a head cannot be read.
    """
    import torch

    from shared.contracts import vocab
    from shared.contracts.hidden_states import read_token_freq

    vocab_size = int(head.config["vocab_size"])
    counts = read_token_freq(after.stage("dump"), vocab_size)
    shares = {}
    for label, each in (("before", head), ("after", read_head(after.export))):
        d2t = each.tensor("d2t")
        ids = torch.arange(vocab_size if d2t is None else len(d2t))
        held = vocab.from_token_ids(ids if d2t is None else ids + d2t, vocab_size)
        shares[f"vocabulary_share_{label}"] = vocab.coverage(held, counts)
    return shares


def _compare(before: RunPaths, after: RunPaths, min_gain: float) -> dict[str, Any]:
    """Both acceptance lengths on the same rows, and whether the second is far enough above the first.

    Raises:
        UserError: a report cannot be read.
    """
    result: dict[str, Any] = {"min_gain": min_gain}
    for label, paths in (("before", before), ("after", after)):
        measured = files.read_json(paths.report)["head"]
        result[label] = measured["acceptance"]["acceptance_length"]
        result[f"{label}_interval"] = measured["acceptance"]["acceptance_length_interval"]
        result[f"{label}_tokens_per_s"] = measured["tokens_per_s"]
    result["improved"] = result["after"] >= (1 + min_gain) * result["before"]
    return result
