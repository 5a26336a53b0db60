# SPDX-License-Identifier: Apache-2.0
"""A head in service, and traffic -> a head that fits the traffic, if vLLM says that it is the better one.

In: a recipe, any head that train can start from, the traffic. Out: a run like any other, whose `export/`
is the new head; a run `<name>-before` with the old head's report on the same held-out rows; `adapt.json`
with both acceptance lengths. The old head is only read. Cost: the four stages on the traffic's rows and
one more bench. What is done already takes seconds.
"""

import contextlib
import dataclasses
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.contracts.head_folder import Head, draft_token_ids, read_head
from shared.errors import EXIT_DONE, OutputError, UserError
from shared.io import files
from shared.paths import STAGES, RunPaths
from shared.recipe import read_recipe
from shared.target import model as target
from stages.ops.adapt import kept, recipes
from stages.ops.adapt.gain import compare, rule, told
from stages.ops.adapt.kept import Traffic
from stages.ops.adapt.recipes import Recipe
from stages.ops.adapt.room import Room
from stages.ops.adapt.traffic import Split
from stages.ops.chain import processes
from stages.ops.chain import run as chain
from stages.ops.config import AdaptConfig, RunChainConfig

logger = logging.getLogger(__name__)


def run(config: AdaptConfig) -> int:
    """Adapt the head; returns the exit code of the stage that failed, or 0.

    Raises:
        UserError: the traffic, the head or the recipe does not fit.
        OutputError: the new head is not better.
    """
    recipe = read_recipe(config.recipe)
    after = processes.run_paths(config.recipe, config.workspace)
    before = RunPaths(config.workspace, f"{after.run_name}-before")
    recipes.require_free(recipe, config.recipe)
    recipes.require_own(config.recipe, before, after)
    traffic = Traffic(config.traffic, config.workspace, config.max_rows, _room(config, after))
    job = _Job(config, recipe, _old_head(config, after), before, after)
    folder = recipes.rows_folder(after)
    with tempfile.TemporaryDirectory(prefix="eyrie-adapt-") as name:
        aside = Path(name)
        rows = (None if config.overwrite else kept.kept(traffic, folder)) or traffic.split(aside)
        # Before the old head is measured, since train may not take it; and before anything is written.
        with _named_as_written(config.recipe, aside, folder):
            for asked, paths in job.chains(rows, aside):
                chain.look_ahead(asked, paths, even_if_done=True)
        if config.dry_run:
            return EXIT_DONE
        chains = job.chains(dataclasses.replace(rows, folder=folder))
        kept.place(rows, folder)
    for asked, _ in chains:
        if (code := chain.run(asked)) != EXIT_DONE:
            return code
    return job.judge(rows)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One adaptation: what is given, and the two runs of it."""

    config: AdaptConfig
    recipe: Recipe
    head: Head
    before: RunPaths
    after: RunPaths

    def chains(
        self, rows: Split, aside: Path | None = None
    ) -> list[tuple[RunChainConfig, RunPaths]]:
        """The old head's bench and the new head's run, with their recipes written.

        Args:
            aside: where to write them for a look ahead; None to run them.
        """
        made = [
            (
                self.before,
                recipes.recipe_before(self.recipe, self.before, self.head, rows),
                ["bench"],
            ),
            (self.after, recipes.recipe_after(self.recipe, self.after, self.head, rows), STAGES),
        ]
        chains = []
        for paths, recipe, only in made:
            path = aside / f"{paths.run_name}.yaml" if aside else paths.recipe
            recipes.write(path, recipe)
            flags = self.config.model_dump(include={"workspace", "overwrite", "dry_run"})
            flags |= {"recipe": path, "only": only, "preflight": aside is not None}
            chains.append((RunChainConfig.model_validate(flags), paths))
        return chains

    def judge(self, rows: Split) -> int:
        """Compare the two heads, and write down how they did.

        Raises:
            OutputError: the new head is not better.
        """
        after, path = self.after, self.after.root / "adapt.json"
        result = compare(self.before, after, self.config.min_gain) | {
            "rows": rows.counts,
            "head_before": str(self.head.folder),
            "head_after": str(after.export),
        }
        files.write_json(path, result)  # the figures that decide, whatever becomes of the others
        result |= _vocabulary_shares(self.head, after)
        files.write_json(path, result)
        gained, asked = told(result), rule(self.config.min_gain, rows.counts["held_out"])
        if not result["improved"]:
            raise OutputError(
                f"{after.run_name}: expected {asked}, found {gained}. "
                f"Keep the old head, {self.head.folder}.",
                code="adapt-no-gain",
                remedy="Give more traffic: there is more to learn from, and a tenth of it, up to 64 chats, "
                "is held out, which narrows the interval. Or raise train.epochs or train.learning_rate in "
                "the recipe. Either with another run.name, or with --overwrite to replace it. Where the "
                "vocabulary holds little of the answers (vocabulary_share_after), train a new head.",
                facts=result,
            )
        logger.info("the new head has what was asked for: %s", asked)
        sys.stdout.write(f"{after.run_name}: {gained} head={after.export} report={after.report}\n")
        return EXIT_DONE


@contextlib.contextmanager
def _named_as_written(recipe: Path, aside: Path, folder: Path) -> Iterator[None]:
    """Have errors name what the user can see, not the copies that only served the look ahead."""
    try:
        yield
    except UserError as error:
        problem = error.problem
        for copy in aside.glob("*.yaml"):
            problem = problem.replace(str(copy), str(recipe))
        raise UserError(
            problem.replace(str(aside), str(folder)),
            code=error.code,
            remedy=error.remedy,
            facts=error.facts,
        ) from error


def _room(config: AdaptConfig, paths: RunPaths) -> Room:
    """What the held-out chats have to fit into, by the recipe's bench.

    Raises:
        UserError: the recipe is not valid.
    """
    asked = RunChainConfig.model_validate(config.model_dump(include={"recipe", "workspace"}))
    (step,) = processes.steps(asked, ["bench"], paths)
    return Room(step.settings, config.workspace)


def _old_head(config: AdaptConfig, paths: RunPaths) -> Head:
    """The head that is in service.

    Raises:
        UserError: there is none, or this run would overwrite it.
    """
    folder = target.locate(
        config.head, config.workspace, revision=config.head_revision, label="--head", is_head=True
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


def _vocabulary_shares(head: Head, after: RunPaths) -> dict[str, float]:
    """Share of the new answers' tokens that the old head can propose, and the new one.

    Nothing where dump's counts or a head cannot be read: the gate needs neither.
    """
    import torch

    from shared.contracts import vocab
    from shared.contracts.hidden_states import read_token_freq

    vocab_size = int(head.config["vocab_size"])
    shares = {}
    try:
        counts = read_token_freq(after.stage("dump"), vocab_size)
        for label, each in (("before", head), ("after", read_head(after.export))):
            ids = torch.tensor(draft_token_ids(each, vocab_size)).sort().values
            shares[f"vocabulary_share_{label}"] = vocab.coverage(
                vocab.from_token_ids(ids, vocab_size), counts
            )
    except UserError as error:
        logger.warning("what the draft vocabularies hold is not known: %s", error.problem)
        return {}
    held = [f"{share:.2%}" for share in shares.values()]
    logger.info("the draft vocabulary holds of the new answers: %s before, %s after", *held)
    return shares
