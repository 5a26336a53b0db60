# SPDX-License-Identifier: Apache-2.0
"""Which head is accepted most, of the same states?

    python -m tests.perf.heads WORKSPACE RUN --peer-python PYTHON

In: a workspace, and a finished run of it. Out: one training per case on that run's dump, by its recipe,
and the acceptance length (AL) of each head in vLLM on the recipe's held-out prompts, greedy, in float32:
a Markdown table, then a line of JSON. Ours are runs named `RUN-heads-CASE`; speculators' are folders of
that name. A second call goes on behind what is done.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from stages.bench.figures.summary import acceptance_length_interval
from stages.bench.head_check import needed_settings

ROOT = Path(__file__).resolve().parents[2]
K, MAX_TOKENS, SEED = 3, 160, 0
COUNTERS = ("num_drafts", "num_accepted_tokens")
OURS: dict[str, dict[str, str]] = {
    "eagle3": {"variant": "eagle3"},
    "eagle3.1": {"variant": "eagle3.1"},
    "eagle3.1-lk_hybrid": {"variant": "eagle3.1", "loss": "lk_hybrid"},
    "eagle3.1-muon": {"variant": "eagle3.1", "optimizer": "muon"},
    # As many TTT steps as speculators' default.
    "eagle3.1-3-steps": {"variant": "eagle3.1", "ttt_steps": "3"},
    "p-eagle": {"variant": "eagle3", "parallel_drafting": "true"},
    "p-eagle-norms": {"variant": "eagle3.1", "parallel_drafting": "true"},
}
# speculators at its own defaults but for the batch: ours, so that both make as many steps of the same tokens;
# the same in the time of our first case; and its own 8,192 tokens a step.
PEERS = ("speculators", "speculators-time", "speculators-8192")
DEFAULT = ["eagle3", "eagle3.1", "eagle3.1-lk_hybrid", "speculators"]

Row = dict[str, Any]


class Comparison:
    """The cases of one run; finished ones are kept in a file of the workspace."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.workspace, self.run = options.workspace.absolute(), options.run
        self.prompts, self.peer_python = options.prompts, options.peer_python
        self.flags = ["--epochs", str(options.epochs)] if options.epochs else []
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
        recipe = self.workspace / self.run / "recipe.yaml"
        flags = {"workspace": self.workspace, "name": self.folder(case).name, "dump_of": self.run}
        flags |= {"mixed_precision": "no"} | OURS[case]
        command = [sys.executable, "-m", "stages.train", "--recipe", str(recipe), *self.flags]
        command += [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        manifest = json.loads((self.folder(case) / "train" / "manifest.json").read_text())
        facts, config = manifest["facts"], manifest["config"]
        return {
            "steps": facts["steps"],
            "tokens": facts["tokens"],
            "seconds": facts["seconds"],
            "walked": facts["walked_acceptance_length"],
            "batch_tokens": config["batch_tokens"],
            "epochs": config["epochs"],
            "head": str(self.folder(case) / "export"),
        }

    def peer(self, case: str) -> Row:
        """Train with speculators: as many tokens as our first case, or for as long."""
        like = self.rows[next(iter(OURS))]
        batch_tokens = 8192 if case == "speculators-8192" else like["batch_tokens"]
        epochs, limit = like["epochs"], []
        if case == "speculators-time":
            done = self.rows["speculators"]
            steps = max(1, round(done["steps"] * like["seconds"] / done["seconds"]))
            epochs = math.ceil(steps * epochs / done["steps"])
            limit = ["--max-steps", str(steps)]
        vocabulary = self.folder(next(iter(OURS))) / "train"
        places = (self.workspace / self.run / "dump", self.target, vocabulary, self.folder(case))
        command = [self.peer_python, "-m", "tests.perf.heads_peer", *map(str, places), *limit]
        command += ["--batch-tokens", str(batch_tokens), "--epochs", str(epochs)]
        found = last_line(command, PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore")
        tokens = found.pop("epoch_tokens") * epochs
        if limit:
            tokens = round(tokens * found["steps"] / (done["steps"] * epochs / like["epochs"]))
        return {**found, "tokens": tokens, "batch_tokens": batch_tokens, "epochs": epochs}

    def measured(self, head: Path) -> Row:
        """`acceptance` in a process of its own."""
        prompts = self.recipe["bench"]["prompts"]
        prompts = prompts["path"] if isinstance(prompts, dict) else prompts
        command = [sys.executable, "-m", "tests.perf.heads", "measure", str(head)]
        command += ["--target", str(self.target), "--held-out", str(self.workspace / prompts)]
        return last_line([*command, "--prompts", str(self.prompts)])


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


def acceptance(target: Path, head: Path, held_out: Path, prompts: int) -> Row:
    """AL and its 95 % interval over the first held-out prompts, in an engine of this process.

    One prompt at a time, so that the engine's counters tell the prompts apart.
    """
    from vllm import LLM, SamplingParams

    drafting = {"method": "eagle3", "model": str(head), "num_speculative_tokens": K}
    llm = LLM(
        model=str(target),
        dtype="float32",
        seed=SEED,
        max_model_len=512,
        max_num_seqs=1,
        gpu_memory_utilization=0.2,
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config=drafting | needed_settings(head),
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    requests: list[Row] = []
    before = dict.fromkeys(COUNTERS, 0)
    for line in held_out.read_text().splitlines()[:prompts]:
        chat: Any = [{"role": "user", "content": json.loads(line)["prompt"]}]
        llm.chat(chat, sampling, use_tqdm=False)
        metrics: dict[str, Any] = {metric.name: metric for metric in llm.get_metrics()}
        now = {name: metrics[f"vllm:spec_decode_{name}"].value for name in COUNTERS}
        counters = {name: now[name] - before[name] for name in COUNTERS}
        requests.append({"id": str(len(requests)), "counters": counters})
        before = now
    length = 1 + before["num_accepted_tokens"] / before["num_drafts"]
    interval = acceptance_length_interval(requests, seed=SEED)
    return {"vllm": length, "interval": interval, "prompts": len(requests)}


def table(rows: dict[str, Row]) -> str:
    """The Markdown table of all cases."""
    titles = (
        "head",
        "steps",
        "tokens",
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
            f"| {case} | {row['steps']} | {row['tokens']:,} | {row['seconds']:.0f} "
            f"| {row['command_s']:.0f} | {walked} | {row['vllm']:.2f} | {low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines) + "\n"


def measure(words: list[str]) -> None:
    """`python -m tests.perf.heads measure HEAD ...`: one head's AL as a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("head", type=Path)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=96)
    options = parser.parse_args(words)
    found = acceptance(options.target, options.head, options.held_out, options.prompts)
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
