# SPDX-License-Identifier: Apache-2.0
"""What a chain will take: rows, tokens, disk, memory, time, before anything starts.

Where a stage is done its manifest says what came out; before that the recipe's own limits bound it
("at most"), less the rows that `Looks` sees left out. Time is only told where an earlier run of the same
target in this workspace took some.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from rich import filesize
from rich.console import Console
from rich.table import Table

from shared.artifacts.manifest import read_manifest
from shared.contracts import layers
from shared.errors import EyrieError, UserError
from shared.io import safetensors_files
from shared.io.safetensors_files import TensorInfo
from shared.paths import RunPaths, find_input
from shared.prompts import sources
from shared.prompts.rows import BadRow, Prompt
from shared.runtime.tables import cell
from shared.runtime.wording import counted
from shared.target import model as target
from shared.target.model import TargetConfig
from stages.ops.chain import sizes
from stages.ops.chain.earlier import earlier
from stages.ops.chain.inputs import find, prompt_sources
from stages.ops.chain.machine import Machine
from stages.ops.chain.processes import Step
from stages.ops.chain.rows import Looks
from stages.ops.expected import expectation

# Counting more rows than this takes longer than a person waits for a plan.
_MAX_ROWS = 200_000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one stage will take, in words; "" where nothing can be said."""

    stage: str
    state: str
    work: str = ""
    disk: str = ""
    memory: str = ""
    time: str = ""


class Estimates:
    """The estimates of a chain, each stage's from what the ones before it leave."""

    def __init__(
        self,
        steps: Sequence[Step],
        paths: RunPaths,
        machine: Machine,
        looks: Looks,
        *,
        asks_hub: bool = False,
    ) -> None:
        """Take a look at nothing yet.

        Args:
            asks_hub: for the config.json of a target that is no folder here.
        """
        self.asks_hub = asks_hub
        self.steps = steps
        self.paths = paths
        self.machine = machine
        self._looks = looks
        self._rows: dict[str, int | None] = {}
        self._bench_answers = 0

    def rows(self) -> list[Estimate]:
        return [self._done(step) if step.done else self._ahead(step) for step in self.steps]

    def expectation(self) -> str:
        """What was reached with as many rows as train will get; "" where nothing compares.

        Asked after `rows`.
        """
        step = next((step for step in self.steps if step.stage == "train" and not step.done), None)
        config = self._target(step) if step else None
        if step is None or config is None or step.settings.get("init_from"):
            return ""  # a warm start has learnt from other rows before
        rows = self._rows.get("train") or 0
        limit = step.settings.get("max_samples") or rows
        line = expectation(min(rows, limit), step.settings["epochs"], config.hidden_size)
        gates = [s.settings["min_acceptance_length"] for s in self.steps if s.stage == "bench"]
        required = f"; bench.min_acceptance_length requires {gates[0]:g}" if gates else ""
        return line and line + required

    def warnings(self) -> Iterator[str]:
        """What the numbers of rows mean for a stage. Asked after `rows`."""
        if self._rows.get("train") == 1 and any(
            s.stage == "train" and not s.done for s in self.steps
        ):
            yield (
                "train: its one row is trained on and none is held out, so no walked acceptance length "
                "tells what the head has learnt. Give synth more prompts."
            )

    def _done(self, step: Step) -> Estimate:
        folder = self.paths.export if step.stage == "train" else self.paths.stage(step.stage)
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(
                f"{folder}: its manifest was removed while it was read.",
                code="manifest-removed",
                remedy="Run the same command again.",
                facts={"folder": str(folder)},
            )
        rows = self._rows[step.stage] = int(manifest["counts"]["ok"])
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        tokens = manifest["facts"].get("tokens")
        work = counted(rows, "row") + (f", {counted(tokens, 'token')}" if tokens else "")
        return Estimate(step.stage, "done", work, filesize.decimal(size))

    def _ahead(self, step: Step) -> Estimate:
        rows = self._rows[step.stage] = self._count(step)
        config = self._target(step)
        if rows is None:
            work, tokens = self._unknown_rows(step), None
        else:
            tokens = self._tokens(step, rows)
            work = f"{counted(rows, 'row')}, at most {counted(tokens, 'token')}"
            if most := step.settings.get("max_steps"):
                work += f", at most {counted(most, 'step')}"
            if (prefills := self._prefills(step)) > 1:
                work += f", {prefills} prefills of each"
        return Estimate(
            step.stage,
            "to do",
            work,
            self._disk(step, config, tokens),
            self._memory(step, config),
            self._time(step, rows),
        )

    def _count(self, step: Step) -> int | None:
        """Rows that a stage will get at most, as far as files and limits say."""
        if listed := prompt_sources(step):
            total = step.settings.get("max_samples") or step.settings.get("max_prompts")
            if any(sources.is_on_hub(source, self.paths.workspace) for source in listed):
                return int(total) if total else None
            limits = [each.get("max_samples") for each in step.settings.get("sources", ())]
            read = itertools.chain.from_iterable(
                itertools.islice(sources.read_source(source, self.paths.workspace), limit)
                for source, limit in itertools.zip_longest(listed, limits)
            )
            try:
                rows = list(itertools.islice(read, min(total or _MAX_ROWS, _MAX_ROWS)))
            except EyrieError:  # preflight says what is wrong with it
                return None
            if step.stage == "bench":
                self._bench_answers = sum(map(_answers, rows))
            prompts = sum(isinstance(row, Prompt) for row in rows)
            return round(prompts * self._looks.left(step))
        parent = {"dump": "synth", "train": "dump"}.get(step.stage)
        if parent is None or step.settings.get("states"):
            return None
        if parent in self._rows:
            return self._rows[parent]
        made = read_manifest(self.paths.stage(parent))
        return int(made["counts"]["ok"]) if made else None

    def _unknown_rows(self, step: Step) -> str:
        """Where the rows come from of which nobody can say how many there are."""
        if step.settings.get("states"):
            return "the states of dump.states"
        listed = prompt_sources(step)
        if any(sources.is_on_hub(source, self.paths.workspace) for source in listed):
            return "rows of a hub's data set"
        if listed:
            return "no rows that can be read"
        if step.stage == "bench":
            return "the prompts that come with bench"
        return "the rows of synth" if step.stage == "dump" else "the rows of dump"

    def _tokens(self, step: Step, rows: int) -> int:
        longest = int(step.run["max_length_tokens"])
        if step.stage == "bench":
            return (self._bench_answers or rows) * max(step.settings["max_tokens"])
        made = read_manifest(self.paths.stage("synth"))
        if made and step.stage != "synth" and "tokens" in made["facts"]:
            tokens = int(made["facts"]["tokens"])
        else:
            tokens = rows * longest
        tokens *= int(step.settings.get("epochs", 1))
        most, batch = step.settings.get("max_steps"), step.settings.get("batch_tokens")
        return min(tokens, most * batch) if most and isinstance(batch, int) else tokens

    def _prefills(self, step: Step) -> int:
        """How often dump computes a row: with a window, once in each of train's epochs."""
        train = next((each for each in self.steps if each.stage == "train"), None)
        is_again = step.stage == "dump" and step.settings["window_shards"] and train
        return int(train.settings["epochs"]) if is_again and train else 1

    def _target(self, step: Step) -> TargetConfig | None:
        found = find_input(step.target, self.paths.workspace)
        try:
            if found is None and self.asks_hub:
                found, _ = find(step.target, step.run["target_revision"], self.paths)
            return target.read_config(found) if found is not None and found.is_dir() else None
        except EyrieError:  # preflight says what is wrong with it
            return None

    def _tensors(self, step: Step, config: TargetConfig) -> dict[str, TensorInfo]:
        """Of a target on the hub, by their headers.

        Raises:
            EyrieError: there are none.
        """
        _, headers = find(step.target, step.run["target_revision"], self.paths)
        return headers or safetensors_files.list_tensors(config.folder)

    def _disk(self, step: Step, config: TargetConfig | None, tokens: int | None) -> str:
        try:
            if step.stage == "synth" and tokens is not None:
                return f"at most {filesize.decimal(8 * tokens)}"  # ids, text and spans, before compression
            if step.stage == "dump" and config and tokens is not None:
                aux = layers.resolve_aux_layers(step.run["aux_layers"], config.num_layers)
                dtype = step.settings["state_dtype"]
                size = layers.state_bytes(tokens, len(aux), config.hidden_size, dtype)
                if (held := sizes.held_states(step.settings, size)) < size:
                    whole = filesize.decimal(size)
                    return f"at most {filesize.decimal(held)} (without a window {whole})"
                return f"at most {filesize.decimal(size)}"
            if step.stage == "train" and config:
                head = sizes.head_config(step.run, config, step.settings)
                return filesize.decimal(
                    sizes.checkpoints_bytes(head, step.settings) + 4 * head.num_parameters
                )
        except EyrieError:  # preflight says what is wrong with it
            return ""
        return ""

    def _memory(self, step: Step, config: TargetConfig | None) -> str:
        if config is None:
            return ""
        if step.stage == "train":
            try:
                head = sizes.head_config(step.run, config, step.settings)
                size = sizes.train_bytes(head, step.settings["optimizer"])
            except EyrieError:  # preflight says what is wrong with it
                return ""
            return f"{filesize.decimal(size)} and activations"
        if step.settings.get("endpoints") or step.settings.get("endpoint"):
            return "the endpoint's"
        if step.settings.get("states"):
            return "of three tensors of the target"
        parts = sizes.gpus_a_copy(step)
        try:
            size = sizes.weight_bytes(self._tensors(step, config)) // parts
        except EyrieError:  # preflight says what is wrong with it
            return ""
        where = "a GPU" if self.machine.gpus else "of memory"
        return f"{filesize.decimal(size)} {where} for weights, and the KV cache"

    def _time(self, step: Step, rows: int | None) -> str:
        found = earlier(self.paths, step)
        if found is None or not rows:
            return "unknown"
        seconds = found.seconds * rows * step.settings.get("epochs", 1) / found.passes
        if found.steps and (most := step.settings.get("max_steps")):
            seconds = min(seconds, found.seconds * most / found.steps)
        but = f", with other {', '.join(found.differing)}" if found.differing else ""
        return f"about {_duration(seconds)} (as {found.run} took{but})"


def _answers(row: Prompt | BadRow) -> int:
    """Answers that bench measures for a row: one per turn that brings none, and the last turn's."""
    turns = row.turns if isinstance(row, Prompt) else ()
    return sum(turn.answer is None or turn is turns[-1] for turn in turns)


def show(name: str, found: Sequence[Estimate], machine: Machine, console: Console) -> None:
    """Print the plan."""
    table = Table(title=cell(f"{name}: plan on {machine}"))
    columns = [field.name for field in dataclasses.fields(Estimate)]
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in found:
        table.add_row(*(cell(getattr(row, column)) for column in columns))
    console.print(table)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
