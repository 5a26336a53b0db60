# SPDX-License-Identifier: Apache-2.0
"""Which of our heads is accepted most, of the same states and steps?   python -m tests.perf.heads WORKSPACE

In: the workspace of a finished demo. Out: one training per case on the demo's dump, as runs of that
workspace named `heads-CASE-EPOCHS`, and each head's acceptance length (AL) in vLLM on the demo's held-out
prompts, greedy, in float32: a Markdown table, then a line of JSON. A second call goes on behind what is done.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from stages.bench.figures.summary import acceptance_length_interval

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "compose" / "recipes" / "demo" / "recipe.yaml"
K, MAX_TOKENS, SEED = 3, 160, 0
COUNTERS = ("num_drafts", "num_accepted_tokens")
CASES: dict[str, dict[str, str]] = {
    "eagle3": {},
    "eagle3.1": {"variant": "eagle3.1"},
    "eagle3.1-lk_hybrid": {"variant": "eagle3.1", "loss": "lk_hybrid"},
}


def train(workspace: Path, case: str, name: str, epochs: int) -> dict[str, Any]:
    """Train one case, or take the finished training; its facts."""
    flags = {"workspace": str(workspace), "name": name, "dump_of": "demo", "epochs": str(epochs)}
    flags |= {"mixed_precision": "no", "export_dtype": "float32"} | CASES[case]
    command = [sys.executable, "-m", "stages.train", "--recipe", str(RECIPE)]
    command += [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    manifest = json.loads((workspace / name / "train" / "manifest.json").read_text())
    facts: dict[str, Any] = manifest["facts"]
    return facts


def acceptance(target: Path, head: Path, prompts: int) -> dict[str, Any]:
    """AL and its 95 % interval over the first held-out prompts, in an engine of this process.

    One prompt at a time, so that the engine's counters tell the prompts apart.
    """
    from vllm import LLM, SamplingParams

    lines = (target / "held_out.jsonl").read_text().splitlines()[:prompts]
    llm = LLM(
        model=str(target),
        dtype="float32",
        seed=SEED,
        max_model_len=512,
        max_num_seqs=1,
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config={"method": "eagle3", "model": str(head), "num_speculative_tokens": K},
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    requests: list[dict[str, Any]] = []
    before = dict.fromkeys(COUNTERS, 0)
    for line in lines:
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


def measure(workspace: Path, name: str, prompts: int) -> dict[str, Any]:
    """`acceptance` in a process of its own."""
    command = [sys.executable, "-m", "tests.perf.heads", str(workspace), "--measure", name]
    command += ["--prompts", str(prompts)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The Markdown table of all cases."""
    head = "| head | steps | training s | walked AL | AL in vLLM | 95 % interval |"
    lines = [head, "|---" * 6 + "|"]
    for case, row in rows.items():
        low, high = row["interval"]
        lines.append(
            f"| {case} | {row['steps']} | {row['seconds']:.0f} | {row['walked']:.2f} "
            f"| {row['vllm']:.2f} | {low:.2f} to {high:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    workspace = options.workspace.absolute()
    if options.measure:
        head = workspace / options.measure / "export"
        found = acceptance(workspace / "targets" / "demo", head, options.prompts)
        sys.stdout.write("\n" + json.dumps(found) + "\n")
        return
    kept = workspace / f"perf-heads-{options.epochs}-{options.prompts}.json"
    rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    for case in options.cases:
        if case in rows:
            continue
        name = f"heads-{case}-{options.epochs}"
        facts = train(workspace, case, name, options.epochs)
        rows[case] = {
            "date": time.strftime("%Y-%m-%d"),
            "steps": facts["steps"],
            "seconds": facts["seconds"],
            "walked": facts["walked_acceptance_length"],
            **measure(workspace, name, options.prompts),
        }
        kept.write_text(json.dumps(rows, indent=2))
    sys.stdout.write(table(rows) + "\n" + json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
