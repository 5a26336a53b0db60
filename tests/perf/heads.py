# SPDX-License-Identifier: Apache-2.0
"""Which head is accepted most, of the same states?

    python -m tests.perf.heads WORKSPACE RUN --peer-python PYTHON

In: a workspace, and a finished run of it. Out: one training per case on that run's dump, by its recipe,
and the acceptance length (AL) of each head in vLLM on the recipe's held-out prompts, greedy, in float32:
a Markdown table, then a line of JSON. Ours train in the faster precision, as by default; --peer-dtype
is theirs. Ours are runs named `RUN-heads-CASE`; speculators' are folders of that name. A second call
skips what is done.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from shared.vllm.intervals import acceptance_length_interval
from stages.bench.head_check import needed_settings

ROOT = Path(__file__).resolve().parents[2]
K, MAX_TOKENS, SEED = 3, 160, 0
COUNTERS = ("num_drafts", "num_accepted_tokens")
OURS: dict[str, dict[str, str]] = {
    "eagle3": {"variant": "eagle3"},
    "eagle3.1": {"variant": "eagle3.1"},
    "eagle3.1-lk_hybrid": {"variant": "eagle3.1", "loss": "lk_hybrid"},
    "eagle3.1-adamw": {"variant": "eagle3.1", "optimizer": "adamw", "learning_rate": "auto"},
    "eagle3.1-4-steps": {"variant": "eagle3.1", "ttt_steps": "4"},
    "p-eagle": {"variant": "eagle3", "parallel_drafting": "true"},
    "p-eagle-norms": {"variant": "eagle3.1", "parallel_drafting": "true"},
}
LIKE = "eagle3.1"  # whose tokens, batch, time and draft vocabulary speculators get
# speculators at its own defaults but for the batch: ours, so that both make as many steps of the same tokens;
# the same in our training time; and its own 8,192 tokens a step.
PEERS = ("speculators", "speculators-time", "speculators-8192")
DEFAULT = ["eagle3", LIKE, "eagle3.1-lk_hybrid", "speculators", "speculators-time"]

Row = dict[str, Any]


class Comparison:
    """The cases of one run; finished ones are kept in a file of the workspace."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.workspace, self.run = options.workspace.absolute(), options.run
        self.prompts, self.peer_python = options.prompts, options.peer_python
        self.peer_dtype = options.peer_dtype
        self.flags = {"epochs": str(options.epochs)} if options.epochs else {}
        self.recipe = yaml.safe_load((self.workspace / self.run / "recipe.yaml").read_text())
        self.target = self.workspace / self.recipe["run"]["target"]
        self.kept = self.workspace / f"{self.run}-heads.json"
        self.rows = self.read()

    def read(self) -> dict[str, Row]:
        return json.loads(self.kept.read_text()) if self.kept.exists() else {}

    def folder(self, case: str) -> Path:
        return self.workspace / f"{self.run}-heads-{case}"

    def add(self, case: str) -> None:
        """Train a case and measure its head, or take what is done of that."""
        if case not in self.rows:
            started_s = time.monotonic()
            row = self.ours(case) if case in OURS else self.peer(case)
            row |= {"date": time.strftime("%Y-%m-%d"), "command_s": time.monotonic() - started_s}
            self.keep(case, row)
        if "vllm" not in self.rows[case]:
            self.keep(case, self.rows[case] | self.measured(Path(self.rows[case]["head"])))

    def keep(self, case: str, row: Row) -> None:
        self.rows = self.read() | {case: row}  # another call may have added to it
        self.kept.write_text(json.dumps(self.rows, indent=1))

    def ours(self, case: str) -> Row:
        """Train with `python -m stages.train`, as the recipe says."""
        return train(self.workspace, self.run, self.folder(case).name, OURS[case] | self.flags)

    def peer(self, case: str) -> Row:
        """Train with speculators: as many tokens as `LIKE`, or for as long."""
        like = self.rows[LIKE]
        batch_tokens = 8192 if case == "speculators-8192" else like["batch_tokens"]
        epochs, limit = like["epochs"], []
        if case == "speculators-time":
            done = self.rows["speculators"]
            steps = max(1, round(done["steps"] * like["seconds"] / done["seconds"]))
            epochs = math.ceil(steps * epochs / done["steps"])
            limit = ["--max-steps", str(steps)]
        vocabulary = self.folder(LIKE) / "train"
        places = (self.workspace / self.run / "dump", self.target, vocabulary, self.folder(case))
        command = [self.peer_python, "-m", "tests.perf.heads_peer", *map(str, places), *limit]
        command += ["--batch-tokens", str(batch_tokens), "--epochs", str(epochs)]
        command += ["--dtype", self.peer_dtype]
        found = last_line(command, PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore")
        tokens = found.pop("epoch_tokens") * epochs
        if limit:
            tokens = round(tokens * found["steps"] / (done["steps"] * epochs / like["epochs"]))
        sizes = {"tokens": tokens, "batch_tokens": batch_tokens, "epochs": epochs}
        return {**found, **sizes, "dtype": self.peer_dtype}

    def measured(self, head: Path) -> Row:
        """`acceptance` in a process of its own."""
        prompts = self.recipe["bench"]["prompts"]
        prompts = prompts["path"] if isinstance(prompts, dict) else prompts
        (found,) = measured(head, self.target, [self.workspace / prompts], self.prompts).values()
        return found


def train(workspace: Path, run: str, name: str, flags: Mapping[str, str]) -> Row:
    """A training on `run`'s dump with `python -m stages.train`, as its recipe says but for the flags."""
    recipe = workspace / run / "recipe.yaml"
    settings = {"workspace": str(workspace), "name": name, "dump_of": run, **flags}
    command = [sys.executable, "-m", "stages.train", "--recipe", str(recipe)]
    command += [word for flag, value in settings.items() for word in (f"--{flag}", value)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    manifest = json.loads((workspace / name / "train" / "manifest.json").read_text())
    facts, config = manifest["facts"], manifest["config"]
    return {
        "steps": facts["steps"],
        "tokens": facts["tokens"],
        "seconds": facts["seconds"],
        "walked": facts["walked_acceptance_length"],
        "dtype": facts["mixed_precision"],
        "batch_tokens": config["batch_tokens"],
        "epochs": config["epochs"],
        "head": str(workspace / name / "export"),
    }


def measured(
    head: Path, target: Path, held_out: list[Path], prompts: int, at_once: int = 1
) -> dict[str, Row]:
    """`acceptance` in a process of its own."""
    command = [sys.executable, "-m", "tests.perf.heads", "measure", str(head)]
    command += ["--target", str(target), "--held-out", *map(str, held_out)]
    return last_line([*command, "--prompts", str(prompts), "--at-once", str(at_once)])


def last_line(command: list[str], **environment: str) -> Row:
    """Run a command and read its last line of JSON; an engine that ends may write on."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    found: Row = json.loads([x for x in done.stdout.splitlines() if x.startswith("{")][-1])
    return found


def acceptance(
    target: Path, head: Path, held_out: list[Path], prompts: int, at_once: int = 1
) -> dict[str, Row]:
    """AL and its 95 % interval over the first prompts of each file, by its stem, in an engine in here.

    The `at_once` prompts in flight are one sample of the interval: the engine's counters tell no more
    apart.
    """
    from vllm import LLM

    drafting = {"method": "eagle3", "model": str(head), "num_speculative_tokens": K}
    llm = LLM(
        model=str(target),
        dtype="float32",
        seed=SEED,
        max_model_len=512,
        max_num_seqs=at_once,
        gpu_memory_utilization=0.2,
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config=drafting | needed_settings(head),
    )
    found = {}
    for path in held_out:
        questions = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
        counters = list(counted(llm, questions[:prompts], at_once))
        requests = [{"id": str(index), "counters": each} for index, each in enumerate(counters)]
        drafts, accepted = (sum(each[name] for each in counters) for name in COUNTERS)
        found[path.stem] = {
            "vllm": 1 + accepted / drafts,
            "interval": acceptance_length_interval(requests, seed=SEED),
            "prompts": min(prompts, len(questions)),
        }
    return found


def counted(llm: Any, questions: list[str], at_once: int) -> Iterator[dict[str, int]]:
    """What the engine's counters rise by, for each `at_once` questions."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    before = counters(llm)
    for start in range(0, len(questions), at_once):
        chats: Any = [
            [{"role": "user", "content": question}]
            for question in questions[start : start + at_once]
        ]
        llm.chat(chats, sampling, use_tqdm=False)
        now = counters(llm)
        yield {name: now[name] - before[name] for name in COUNTERS}
        before = now


def counters(llm: Any) -> dict[str, int]:
    """The engine's counters since its start; 0 before the first draft."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    found = {name: metrics.get(f"vllm:spec_decode_{name}") for name in COUNTERS}
    return {name: metric.value if metric else 0 for name, metric in found.items()}


def table(rows: dict[str, Row]) -> str:
    """The Markdown table of all cases."""
    titles = (
        "head",
        "steps",
        "tokens",
        "products in",
        "training s",
        "command s",
        "walked AL",
        "AL in vLLM",
        "95 % interval",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for case, row in rows.items():
        low, high = row["interval"]
        walked = f"{row['walked']:.2f}" if "walked" in row else ""
        lines.append(
            f"| {case} | {row['steps']} | {row['tokens']:,} | {row['dtype']} "
            f"| {row['seconds']:.0f} | {row['command_s']:.0f} | {walked} | {row['vllm']:.2f} "
            f"| {low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines) + "\n"


def measure(words: list[str]) -> None:
    """`python -m tests.perf.heads measure HEAD ...`: one head's AL on each file as a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("head", type=Path)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True, nargs="+")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--at-once", type=int, default=1)
    found = acceptance(**vars(parser.parse_args(words)))
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        return measure(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("workspace", type=Path)
    parser.add_argument("run")
    parser.add_argument("--peer-python", help="Of an environment that holds speculators.")
    parser.add_argument("--peer-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cases", nargs="+", default=DEFAULT, choices=[*OURS, *PEERS])
    parser.add_argument("--epochs", type=int, help="Default: the recipe's.")
    parser.add_argument("--prompts", type=int, default=96)
    comparison = Comparison(parser.parse_args())
    for case in parser.parse_args().cases:
        comparison.add(case)
    rows = {case: row for case, row in comparison.rows.items() if "vllm" in row}
    sys.stdout.write(table(rows) + "\n" + json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
