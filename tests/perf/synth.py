# SPDX-License-Identifier: Apache-2.0
"""Is the server ever kept waiting?   python -m tests.perf.synth

Both clients in one run, in turns, on one server: vLLM's own benchmark client, and the stage itself
with its input, ids, Parquet and all, on the same prompts at the same concurrency. Counted are output
tokens over the time from the first request to the last answer. Then what a request costs our client in
processor time, against a server that computes nothing, and what many input rows cost in memory.
The last line is JSON.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shared.settings import build
from stages.synth.client import Endpoint
from stages.synth.config import SynthConfig
from stages.synth.engine import serve
from tests.loopback import loopback
from tests.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
MAX_LENGTH_TOKENS = 512
MAX_TOKENS = 96


def write_prompts(path: Path, num_rows: int, *, seed: int) -> None:
    """Rows of 5 to 60 words, no two the same."""
    words = random.Random(seed)
    with path.open("w") as lines:
        for index in range(num_rows):
            text = " ".join(f"w{words.randrange(10_000)}" for _ in range(words.randint(5, 60)))
            lines.write(json.dumps({"id": str(index), "prompt": text}) + "\n")


def synth(workspace: Path, target: Path, url: str, key: str, **flags: Any) -> dict[str, float]:
    """Run the stage in a process of its own; its tokens/s, its processor time, its peak memory."""
    words = [sys.executable, "-m", "stages.synth", "--workspace", str(workspace)]
    words += ["--target", str(target), "--endpoints", url, "--overwrite"]
    flags |= {"max_length_tokens": MAX_LENGTH_TOKENS, "max_tokens": MAX_TOKENS}
    words += [f"--{name}={value}" for name, value in flags.items()]
    script = "import sys; from tests.perf.synth import run_stage; run_stage(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, *words[3:]],
        cwd=ROOT,
        env={**os.environ, "EYRIE_ENDPOINT_KEY": key, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def run_stage(arguments: list[str]) -> None:
    """The stage, its answering phase timed from within: what `synth` starts."""
    from stages.synth import run as stage

    flags = {}
    words = [word for argument in arguments for word in argument.split("=", 1)]
    names = iter(words)
    for name in names:
        flags[name.removeprefix("--")] = "true" if name == "--overwrite" else next(names)
    answer = stage._answer
    measured = {}

    async def timed(*given: Any) -> Any:
        import stages.synth.answers  # noqa: F401  # imports are no part of a request

        began_s, busy_s = time.monotonic(), time.process_time()
        accounting = await answer(*given)
        measured.update(
            seconds=time.monotonic() - began_s,
            processor_s=time.process_time() - busy_s,
            rows=accounting.rows_in,
        )
        return accounting

    stage._answer = timed
    config = build(SynthConfig, flags)
    stage.run(config)
    manifest = json.loads((config.paths.stage("synth") / "manifest.json").read_text())
    measured["answer_tokens"] = manifest["facts"]["answer_tokens"]
    measured["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(json.dumps(measured) + "\n")


def vllm_client(
    target: Path, prompts: Path, endpoint: Endpoint, num_rows: int, concurrency: int
) -> float:
    """Output tokens/s as vLLM's own benchmark client measures them."""
    script = (
        "import argparse; from vllm.benchmarks.serve import add_cli_args, main; "
        "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
        "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
    )
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "backend": "openai-chat",
            "base-url": endpoint.address.base_url,
            "endpoint": "/v1/chat/completions",
            "model": endpoint.model,
            "tokenizer": target,
            "dataset-name": "custom",
            "dataset-path": prompts,
            "custom-output-len": MAX_TOKENS,
            "num-prompts": num_rows,
            "max-concurrency": concurrency,
            "temperature": 0,
            "seed": 0,
            "result-dir": folder,
            "result-filename": "result.json",
        }
        words = [f"--{name}={value}" for name, value in flags.items()]
        words += ["--save-result", "--disable-tqdm", "--disable-shuffle", "--skip-chat-template"]
        subprocess.run(
            [sys.executable, "-c", script, *words],
            cwd=ROOT,
            env={**os.environ, "OPENAI_API_KEY": endpoint.address.api_key, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        result = json.loads((Path(folder) / "result.json").read_text())
    assert result["completed"] == num_rows
    return float(result["output_throughput"])


def against_vllm(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Median output tokens/s of both clients, in turns."""
    target = tiny_llama(folder / "target", hidden_size=options.hidden, num_layers=8)
    write_prompts(folder / "prompts.jsonl", options.rows, seed=0)
    settings = {"target": str(target), "prompts": "prompts.jsonl", "workspace": str(folder)}
    settings |= {"max_length_tokens": str(MAX_LENGTH_TOKENS)}
    config = build(SynthConfig, {**settings, "concurrency": str(options.concurrency)})
    ours: list[float] = []
    theirs: list[float] = []
    with serve(config, target) as endpoint:
        for round_number in range(options.rounds + 1):
            run = synth(
                folder,
                target,
                endpoint.address.base_url,
                endpoint.address.api_key,
                prompts="prompts.jsonl",
                concurrency=options.concurrency,
            )
            client = vllm_client(
                target, folder / "prompts.jsonl", endpoint, options.rows, options.concurrency
            )
            if round_number:  # the first one warms the server up
                ours.append(run["answer_tokens"] / run["seconds"])
                theirs.append(client)
    return {
        "rows": options.rows,
        "concurrency": options.concurrency,
        "ours_tokens_per_s": round(statistics.median(ours), 1),
        "vllm_tokens_per_s": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ours) / statistics.median(theirs), 3),
        "ratios": [round(a / b, 3) for a, b in zip(ours, theirs, strict=True)],
    }


def cost_of_requests(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Processor milliseconds a request, and resident memory over many input rows."""
    target = tiny_llama(folder / "target")
    write_prompts(folder / "many.jsonl", options.input_rows, seed=1)
    with loopback(folder / "server", target) as url:
        run = synth(folder, target, url, "none", prompts="many.jsonl", concurrency=64)
    return {
        "input_rows": options.input_rows,
        "client_ms_per_request": round(1e3 * run["processor_s"] / run["rows"], 3),
        "requests_per_s": round(run["rows"] / run["seconds"], 1),
        "peak_rss_mb": round(run["peak_rss_mb"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200, help="prompts for both clients")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=256, help="width of the random target")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--input_rows", type=int, default=200_000, help="for cost and memory")
    parser.add_argument("--only", choices=["client", "cost"])
    options = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "cost":
            result |= against_vllm(options, Path(folder) / "a")
        if options.only != "client":
            result |= cost_of_requests(options, Path(folder) / "b")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
