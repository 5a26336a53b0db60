# SPDX-License-Identifier: Apache-2.0
"""bench on real engines: known acceptance, raw counters computed again, and what may go wrong.

The targets are tiny and random, so that an engine costs little; speed-ups mean nothing here.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.io import files
from shared.prompts.rows import Prompt, Turn
from shared.runtime.children import held_port
from shared.settings import build
from shared.vllm.measured_rows import conversation_of
from stages.bench.config import BenchConfig
from stages.bench.measure import measurement, plans
from tests import recompute
from tests.conftest import ROOT
from tests.engine.bench.commands import bench, change, command, refused, report_of
from tests.heads import write_random_head
from tests.models import tiny_llama

pytestmark = pytest.mark.engine

SYNTHETIC = ROOT / "tests" / "engine" / "synthetic"
KEY = "a key for the test"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a random target, a target that always says token 0, and heads for both."""
    workspace = tmp_path_factory.mktemp("bench")
    tiny = tiny_llama(workspace / "tiny", max_length_tokens=512)
    write_random_head(workspace / "head", target=tiny, draft_vocab_size=128)
    constant = tiny_llama(workspace / "constant", tied=False, max_length_tokens=512)
    # All logits are 0 and the first wins: the target says 0, the head 0 + d2t[0].
    change(constant, lm_head__weight=torch.zeros(512, 128, dtype=torch.bfloat16))
    for name, offset in (("always", 0), ("never", 5)):
        head = write_random_head(workspace / name, target=constant, draft_vocab_size=128)
        offsets = torch.full((128,), offset, dtype=torch.int64)
        is_drafted = torch.isin(torch.arange(512), torch.arange(128) + offset)
        change(head, lm_head__weight=torch.zeros(128, 128), d2t=offsets, t2d=is_drafted)
    rows: list[dict[str, Any]] = [
        {"id": f"one-{n}", "category": "singles", "prompt": f"Tell me about {n} things."}
        for n in range(6)
    ]
    rows += [
        {"question_id": n, "category": "pairs", "turns": [f"Name {n} tools.", "And others?"]}
        for n in range(3)
    ]
    (workspace / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workspace


def test_acceptance_at_set_rates_is_what_is_reported(place: Path) -> None:
    """vLLM's synthetic rejection: position 0 always, position 1 at 0.6, position 2 never."""
    speculative = {
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_rates": [1.0, 0.6, 0.0],
    }
    path = os.pathsep.join((str(SYNTHETIC), os.environ.get("PYTHONPATH", str(ROOT))))
    flags = ("--target", "tiny", "--head", "head", "--max_tokens", "96", "--concurrency", "4")
    flags += ("--speculative_args", json.dumps(speculative), "--max_wrong_answers", "null")
    done = bench(place, "synthetic", *flags, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = report_of(place, "synthetic")
    acceptance = found["head"]["acceptance"]
    assert acceptance["num_drafts"] > 150
    error = 4 * math.sqrt(0.6 * 0.4 / acceptance["num_drafts"])
    assert acceptance["per_position"][0] == 1.0
    assert acceptance["per_position"][1] == pytest.approx(0.6, abs=error)
    assert acceptance["per_position"][2] == 0.0
    assert acceptance["acceptance_length"] == pytest.approx(2.6, abs=error)
    low, high = acceptance["acceptance_length_interval"]
    assert 2.6 - 2 * error < low < acceptance["acceptance_length"] < high < 2.6 + 2 * error
    # A random head's drafts, taken unseen, are wrong tokens: the comparison must say so.
    assert found["lossless"]["compared"] > 0
    assert found["lossless"]["wrong"] > 0.5 * found["lossless"]["compared"]


def test_a_head_that_never_agrees_is_1_and_misses_the_gate(place: Path) -> None:
    done = bench(place, "never", "--target", "constant", "--head", "never", "--max_tokens", "24")
    assert done.returncode == 3, done.stderr[-3000:]
    assert "[gate-missed] acceptance length 1.000 is 1.100 under the gate 2.1" in done.stderr
    assert "Traceback" not in done.stderr
    found = report_of(place, "never")
    assert found["head"]["acceptance"]["acceptance_length"] == 1.0
    assert found["head"]["acceptance"]["per_position"] == [0, 0, 0]
    assert found["head"]["requests"] == found["baseline"]["requests"] == 12  # 6 + 2 turns x 3
    assert found["lossless"]["identical"] == found["lossless"]["compared"] == 12
    assert (place / "never" / "bench" / "report.html").exists()
    assert not (place / "never" / "bench" / "manifest.json").exists()


def test_a_head_that_always_agrees_is_k_plus_1_at_every_k_and_load(place: Path) -> None:
    flags = ("--target", "constant", "--head", "always", "--max_tokens", "24")
    flags += ("--num_speculative_tokens", "[3,5]", "--concurrency", "[1,4]")
    done = bench(place, "always", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    found = report_of(place, "always")
    lengths = {
        (row["num_speculative_tokens"], row["concurrency"]): row["acceptance_length"]
        for row in found["sweep"]
        if row["drafter"] == "head"
    }
    assert lengths == {(3, 1): 4.0, (3, 4): 4.0, (5, 1): 6.0, (5, 4): 6.0}
    # 23 tokens after the prefill's: 6 drafts of 4, so that the last is counted whole.
    assert found["head"]["tokens_per_step"] == pytest.approx(23 / 6)
    assert found["head"]["acceptance"]["num_drafts"] == 6 * 12
    assert {row["concurrency"] for row in found["best"]} == {1, 4}
    baseline = next(row for row in found["sweep"] if row["drafter"] == "baseline")
    ratio = found["head"]["tokens_per_s"] / baseline["tokens_per_s"]
    assert found["head"]["speedup"] == pytest.approx(ratio)
    assert (place / "always" / "bench" / "manifest.json").exists()


def test_served_figures_are_those_of_the_raw_metrics(place: Path) -> None:
    """The two servers' own `/metrics` texts, computed again by tests/recompute.py."""
    flags = ("--target", "constant", "--head", "always", "--max_tokens", "24")
    done = bench(place, "served", *flags, "--concurrency", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    found = report_of(place, "served")
    raw = place / "served" / "bench" / "raw"
    again = recompute.figures(
        (raw / "head.0.0.before.prom").read_text(), (raw / "head.0.0.after.prom").read_text()
    )
    acceptance = found["head"]["acceptance"]
    assert {name: acceptance[name] for name in again} == again
    assert again["acceptance_length"] == 4.0
    assert recompute.counts((raw / "baseline.0.0.after.prom").read_text()) == {}
    (segment,) = files.read_json(raw / "head.json")["loads"][0]["segments"]
    drafts = [row["counters"]["num_drafts"] for row in segment["requests"]]
    assert sum(drafts) == again["num_drafts"]
    assert {row["turn"] for row in segment["requests"]} == {0, 1}
    assert found["lossless"]["identical"] == found["lossless"]["compared"] == 12
    assert set(found["head"]["categories"]) == {"singles", "pairs"}
    for path in raw.parent.rglob("*"):
        if path.is_file():
            assert "VLLM_API_KEY" not in path.read_text(errors="replace")


@contextlib.contextmanager
def server(target: Path, head: Path) -> Iterator[str]:
    """Somebody else's server: with a head and a key, and without counts by request."""
    with held_port() as port:
        yield from served(target, head, port)


def served(target: Path, head: Path, port: int) -> Iterator[str]:
    speculative = {"method": "eagle3", "model": str(head), "num_speculative_tokens": 3}
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(target)]
    words += ["--port", str(port), "--host", "127.0.0.1", "--enforce-eager"]
    words += ["--speculative-config", json.dumps(speculative), "--max-num-seqs", "4"]
    process = subprocess.Popen(
        words,
        env={**os.environ, "VLLM_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(urllib.error.URLError, ConnectionError),
                urllib.request.urlopen(f"{url}/health"),
            ):
                break
            assert process.poll() is None
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_an_existing_endpoint(place: Path) -> None:
    with server(place / "constant", place / "always") as url:
        flags = ("--target", "constant", "--endpoint", url, "--max_tokens", "24")
        own = {"EYRIE_ENDPOINT_KEY": KEY}
        done = bench(place, "endpoint", *flags, "--concurrency", "2", **own)
        assert done.returncode == 0, done.stderr[-3000:]
        found = report_of(place, "endpoint")
        raw = place / "endpoint" / "bench" / "raw"
        parts = [
            recompute.figures(
                *((raw / f"head.0.{n}.{when}.prom").read_text() for when in ("before", "after"))
            )
            for n in range(2)
        ]
        # No counts by request there: each category is measured between readings of its own.
        for part, category in zip(parts, ("singles", "pairs"), strict=True):
            acceptance = found["head"]["categories"][category]["acceptance"]
            assert {name: acceptance[name] for name in part} == part
        assert (
            sum(part["num_drafts"] for part in parts) == found["head"]["acceptance"]["num_drafts"]
        )
        assert found["head"]["acceptance"]["acceptance_length"] == 4.0
        assert "speedup" not in found["head"]
        assert any("No baseline" in warning for warning in found["warnings"])
        assert KEY not in json.dumps(found)

        other = bench(place, "depth", *flags, "--num_speculative_tokens", "4", **own)
        refused(
            other, 2, "drafts 4 tokens (head), found one that drafts 3", place / "depth" / "bench"
        )
        keyless = bench(place, "keyless", *flags)
        refused(keyless, 2, "refused", place / "keyless" / "bench")
    gone = bench(place, "gone", *flags, **own)
    refused(gone, 75, f"the server at {url} does not answer", place / "gone" / "bench")


def engines_of(workspace: Path) -> list[int]:
    """The vLLM servers that bench started for this workspace."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"vllm.entrypoints.openai.api_server" in words and str(
                workspace
            ).encode() in b" ".join(words):
                found.append(int(entry.name))
    return found


def test_a_killed_engine_is_75(place: Path) -> None:
    # So many that it is not done before the kill, however late that comes.
    rows = [{"id": f"n{n}", "prompt": f"Tell me about {n} things."} for n in range(1000)]
    (place / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = command(place, "killed", "--target", "tiny", "--head", "head", "--max_tokens", "200")
    words += ["--prompts", "many.jsonl"]  # the last one counts
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    folder = place / "killed" / "bench"
    deadline = time.monotonic() + 300
    while not (folder / "raw" / "head.0.0.before.prom").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    (engine,) = engines_of(place)
    os.kill(engine, signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    done = subprocess.CompletedProcess(words, process.returncode, "", stderr)
    refused(done, 75, "[engine-died] the vLLM server died in use", folder)


def test_more_draft_tokens_than_vllm_verifies(place: Path) -> None:
    flags = ("--target", "tiny", "--head", "head", "--max_tokens", "8", "--max_prompts", "2")
    done = bench(place, "deep", *flags, "--num_speculative_tokens", "129")
    refused(done, 2, "expected at most 128", place / "deep" / "bench")


def test_planted_tokens_are_a_tie_or_wrong_by_the_targets_own_logits(
    place: Path, tmp_path: Path
) -> None:
    """A target whose best two logits are always equal: swapped twins tie, a stranger is wrong."""
    target = tiny_llama(tmp_path / "twins", tied=False, max_length_tokens=512)
    rows = torch.zeros(512, 128)
    rows[10] = rows[11] = torch.linspace(-1, 1, 128)
    rows[20] = rows[21] = -rows[10]  # whichever sign the state has, one pair of twins wins
    change(target, lm_head__weight=rows.to(torch.bfloat16))
    flags = {"target": "twins", "workspace": str(tmp_path), "max_tokens": "12", "concurrency": "4"}
    prompts = [
        Prompt(f"p{n}", (Turn(({"role": "user", "content": f"Number {n}?"},)),)) for n in range(5)
    ]
    conversations = [conversation_of(prompt) for prompt in prompts]
    plan = plans.plan_of(build(BenchConfig, flags), target, conversations)
    raw = measurement.measure(plan, "plain", None, tmp_path, others={})
    answers = raw["loads"][0]["segments"][0]["requests"]
    twin, stranger = answers[1]["token_ids"], answers[3]["token_ids"]
    assert {token for answer in answers for token in answer["token_ids"]} <= {10, 11, 20, 21}
    right = (twin[5], stranger[9])
    twin[5] ^= 1  # 10 and 11, 20 and 21
    stranger[9] = 400
    lossless = measurement.measure(plan, "again", None, tmp_path, others={"head": raw})["lossless"]
    found = [
        (d["id"], d["position"], d["baseline_token"], d["verdict"]) for d in lossless["divergences"]
    ]
    assert found == [("p1", 5, right[0], "tie"), ("p3", 9, right[1], "wrong")]
    assert [lossless[key] for key in ("compared", "identical", "ties", "wrong")] == [5, 3, 1, 1]
    assert lossless["divergences"][0]["gap"] == 0.0
    assert lossless["noise_logits"] < 0.5
    assert lossless["changes_measured"] > 20


def test_a_cache_too_small_for_one_row_is_2_with_vllms_own_words(place: Path) -> None:
    flags = ("--target", "tiny", "--head", "head", "--max_tokens", "200", "--max_prompts", "1")
    done = bench(place, "small", *flags, "--engine_args", "{kv_cache_memory_bytes: 20000}")
    refused(
        done, 2, "[engine-start-refused] the vLLM server did not start", place / "small" / "bench"
    )
    assert "No available memory for the cache blocks" in done.stderr
