# SPDX-License-Identifier: Apache-2.0
"""How much of the engine's own speed does capture keep?   python -m tests.perf.dump

Both sides in one run, on the same rows, in turns: vLLM with its own defaults (chunked prefill on)
prefilling without capture, and the stage itself, checks and writing included, as `python -m
stages.dump` does it once its engine stands. A random Llama large enough that computing dominates.
Then the hf backend against a loop of one row at a time. The last line is JSON.
"""

import argparse
import contextlib
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from shared.contracts.conversations import Conversation
from shared.contracts.layers import default_aux_layers, state_bytes
from shared.runtime.status import Accounting
from shared.settings import build
from shared.target import model as targets
from stages.dump.backends.base import Row
from stages.dump.backends.choose import open_backend
from stages.dump.config import DumpConfig
from stages.dump.plan import Plan, settle
from stages.dump.shards.writer import ShardWriter
from tests.models import tiny_llama

LAYERS = 8
MAX_LENGTH_TOKENS = 512
BATCH_TOKENS = 2048


def make_rows(num_rows: int, vocab_size: int) -> list[Conversation]:
    """Rows of 64 to 512 tokens, answered from the middle on."""
    rng = random.Random(0)
    rows = []
    for index in range(num_rows):
        length = rng.randint(64, MAX_LENGTH_TOKENS)
        ids = tuple(rng.randrange(3, vocab_size) for _ in range(length))
        spans = ((length // 2, length),)
        rows.append(Conversation(str(index), "", "", "", (), ids, spans, "", 0, 0))
    return rows


class Bench:
    """One target, one set of rows, several ways through."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.vocab_size = options.vocab_size
        tiny_llama(
            folder / "target",
            tied=False,
            hidden_size=options.hidden_size,
            num_layers=LAYERS,
            vocab_size=options.vocab_size,
        )
        self.target = targets.read_config(folder / "target")
        self.aux_layers = default_aux_layers(LAYERS)
        self.rows = make_rows(options.rows, options.vocab_size)
        self.tokens = sum(len(row.input_ids) for row in self.rows)

    def config(self, backend: str) -> DumpConfig:
        flags = {
            "workspace": str(self.folder),
            "target": "target",
            "max_length_tokens": str(MAX_LENGTH_TOKENS),
            "batch_tokens": str(BATCH_TOKENS),
            "shard_bytes": str(32 << 20),
            "backend": backend,
        }
        return build(DumpConfig, flags)

    def plan(self, folder: Path, backend: str) -> Plan:
        return settle(
            folder,
            self.rows,
            self.config(backend),
            fingerprint="",
            accounting=Accounting(),
            token_bytes=state_bytes(1, 3, self.target.hidden_size),
            vocab_size=self.target.vocab_size,
            backend=backend,
        )

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Any]:
        """A callable that captures, checks and writes all rows; returns its bytes and seconds."""
        config = self.config(name)
        with open_backend(name, config, self.target, self.aux_layers) as backend:

            def once() -> tuple[int, float]:
                with tempfile.TemporaryDirectory(dir=self.folder) as place:
                    plan = self.plan(Path(place), name)
                    # Random rows are nobody's greedy answers: asked all the same, not required.
                    writer = ShardWriter(Path(place), config, self.target, 4, min_agreement=0.0)
                    started_s = time.perf_counter()
                    writer.capture([plan.shards], backend, lambda *_: None)
                    spent_s = time.perf_counter() - started_s
                    written = sum(p.stat().st_size for p in Path(place).glob("shard_*.pt"))
                    return written, spent_s

            yield once

    @contextlib.contextmanager
    def plain(self) -> Iterator[Any]:
        """A callable that prefills all rows in vLLM without capture; returns its seconds.

        vLLM keeps its defaults, except for the length limit, the prefix cache, which would answer
        the second round from memory, and the tokens of a step, where both sides get the same.
        """
        from vllm import LLM, SamplingParams
        from vllm.platforms import current_platform

        llm = LLM(
            str(self.target.folder),
            max_model_len=MAX_LENGTH_TOKENS + 1,
            max_num_batched_tokens=BATCH_TOKENS,
            enable_prefix_caching=False,
            enforce_eager=current_platform.is_cpu(),
        )
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True)
        prompts = [{"prompt_token_ids": list(row.input_ids)} for row in self.rows]

        def once() -> float:
            started_s = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - started_s

        yield once
        llm.llm_engine.engine_core.shutdown()

    def one_row_at_a_time(self, rows: int) -> float:
        """Tokens/s of the loop that peers have: one row, all hidden states, one file."""
        model = AutoModelForCausalLM.from_pretrained(self.target.folder, dtype=torch.bfloat16)
        tokens, started_s = 0, time.perf_counter()
        with torch.inference_mode(), tempfile.TemporaryDirectory(dir=self.folder) as place:
            for index, row in enumerate(self.rows[:rows]):
                ids = torch.tensor([row.input_ids])
                found = model(input_ids=ids, output_hidden_states=True, use_cache=False)
                kept = [found.hidden_states[i][0].clone() for i in (*self.aux_layers, LAYERS)]
                torch.save({"input_ids": ids[0], "hidden_states": kept}, f"{place}/{index}.pt")
                tokens += len(row.input_ids)
        return tokens / (time.perf_counter() - started_s)

    def batched(self, rows: int) -> float:
        """Tokens/s of the hf backend over the same rows."""
        with open_backend("hf", self.config("hf"), self.target, self.aux_layers) as backend:
            asked = [Row(row.input_ids) for row in self.rows[:rows]]
            started_s = time.perf_counter()
            tokens = sum(captured.states.shape[0] for captured in backend.run(asked))
            return tokens / (time.perf_counter() - started_s)


def measure_vllm(bench: Bench, rounds: int) -> dict[str, Any]:
    """Rounds of both sides, in turns; the first of each warms up."""
    plain_s, stage_s, written = [], [], 0
    with bench.plain() as plain, bench.stage("vllm") as stage:
        plain()
        stage()
        for _ in range(rounds):
            plain_s.append(plain())
            written, spent_s = stage()
            stage_s.append(spent_s)
    best_plain, best_stage = statistics.median(plain_s), statistics.median(stage_s)
    return {
        "plain_tokens_s": round(bench.tokens / best_plain, 1),
        "dump_tokens_s": round(bench.tokens / best_stage, 1),
        "ratio": round(best_plain / best_stage, 3),
        "rounds_s": [[round(a, 2), round(b, 2)] for a, b in zip(plain_s, stage_s, strict=True)],
        "written_gb_s": round(written / best_stage / 1e9, 4),
    }


def measure_hf(bench: Bench, rows: int) -> dict[str, Any]:
    """The hf backend against a loop of one row at a time, in turns."""
    loop, batched = [], []
    for _ in range(2):
        loop.append(bench.one_row_at_a_time(rows))
        batched.append(bench.batched(rows))
    return {
        "loop_tokens_s": round(max(loop), 1),
        "hf_tokens_s": round(max(batched), 1),
        "hf_ratio": round(max(batched) / max(loop), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hf_rows", type=int, default=48)
    parser.add_argument("--only", choices=("vllm", "hf"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # By itself vLLM keeps a core of few for its scheduler, but none where there is a connector.
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), options)
        result: dict[str, Any] = {"hidden_size": options.hidden_size, "layers": LAYERS}
        result |= {"rows": options.rows, "tokens": bench.tokens, "threads": torch.get_num_threads()}
        if options.only != "vllm":
            result |= measure_hf(bench, options.hf_rows)
        if options.only != "hf":
            result |= measure_vllm(bench, options.rounds)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
