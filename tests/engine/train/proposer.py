# SPDX-License-Identifier: Apache-2.0
"""Watches vLLM's own EAGLE-3 proposer at work, to hold our model and our walk against it.

In: a target folder, a head folder, K and prompts. Out: per prompt, what the proposer was given (the
target's aux states, the verified tokens) and what it made of it (each step's logits, the drafted
ids), by absolute position, with the engine's counters over all prompts. Costs one engine start in
float32, about ten seconds on two cores. The surprise: an in-process engine changes its process for
good (torch.set_num_threads becomes a no-op), so tests call `observe_in_child`.

Worked example, prompt x_0..x_4 (P = 5), K = 3. The prefill yields x_5 and the first event: position
t = 4, next token x_5, drafts of x_6 x_7 x_8. Say x_6 is accepted: the verification yields x_6 and
x_7, and the next event has t = 6, next token x_7. accepted = 6 - 4 - 1 = 1.

Shapes: T verified positions, A aux layers, H hidden, V target vocab, K draft length.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class DraftEvent:
    """One call of the proposer: K tokens drafted after the verified position t."""

    position: int  # t, the last position whose target state is known
    next_token: int  # x_{t+1}, sampled by the target at t, and the first input of the chain
    drafted: list[int]  # [K] target ids, guesses at x_{t+2} .. x_{t+1+K}
    logits: torch.Tensor  # [K, V] float32, -inf outside the draft vocabulary
    positions: list[int]  # [K] the rotary position of each step: t, t+1, .., t+K-1
    accepted: int | None  # of the K, as the next event tells; None where the answer ended first


@dataclass(frozen=True)
class Trace:
    """One prompt's run through the engine."""

    num_prompt_tokens: int
    tokens: torch.Tensor  # [T+1] int64, x_0 .. x_T; past max_tokens where drafts overshot it
    aux_states: torch.Tensor  # [T, A*H] the target's state at each position, as vLLM passed it
    output_token_ids: list[int]  # what the user gets: at most max_tokens
    events: list[DraftEvent]


@dataclass(frozen=True)
class Observation:
    """All prompts, and the deltas of `vllm:spec_decode_num_*` over them."""

    traces: list[Trace]
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: list[int]


@dataclass
class _Recorder:
    """Stands in the way of the proposer's calls and writes down what passes."""

    rows: dict[int, tuple[int, torch.Tensor]] = field(default_factory=dict)  # t -> x_t, state
    events: list[dict[str, Any]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sample_row: int = 0

    def attach(self, drafter: Any) -> None:
        """Wrap the drafter's propose, and its model's forward and compute_logits."""
        propose, model = drafter.propose, drafter.model
        forward, compute_logits = model.forward, model.compute_logits

        def watched_propose(*args: Any, **kwargs: Any) -> torch.Tensor:
            if args:
                raise RuntimeError("vLLM now calls propose by position: read its runner again")
            at = kwargs["token_indices_to_sample"]
            count = kwargs["target_token_ids"].shape[0]
            self.sample_row = count - 1 if at is None else int(at[0])
            self.logits, self.positions = [], []
            given = (kwargs["target_positions"], kwargs["target_token_ids"])
            positions, tokens = (tensor.tolist() for tensor in given)
            states = kwargs["target_hidden_states"].clone()  # [rows, A*H]
            # Rows past the sampled one were drafts that the target rejected.
            for row in range(self.sample_row + 1):
                self.rows[positions[row]] = (tokens[row], states[row])
            next_token = int(kwargs["next_token_ids"][0])
            drafted = propose(*args, **kwargs)  # [1, K]
            self.events.append(
                {
                    "position": positions[self.sample_row],
                    "next_token": next_token,
                    "drafted": drafted[0].tolist(),
                    "logits": torch.cat(self.logits),
                    "positions": list(self.positions),
                }
            )
            return drafted

        def watched_forward(*args: Any, **kwargs: Any) -> Any:
            row = 0 if self.positions else self.sample_row
            self.positions.append(int(kwargs["positions"][row]))
            return forward(*args, **kwargs)

        def watched_logits(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = compute_logits(*args, **kwargs)  # [1, V]
            self.logits.append(logits.float().clone())
            return logits

        drafter.propose, model.forward = watched_propose, watched_forward
        model.compute_logits = watched_logits

    def take(self, prompt: Sequence[int], output: Sequence[int]) -> Trace:
        """Hand over what was recorded since the last call, as one prompt's trace."""
        length = len(self.rows)
        tokens = [self.rows[t][0] for t in range(length)] + [self.events[-1]["next_token"]]
        after = [event["position"] for event in self.events[1:]]
        accepted = [
            following - event["position"] - 1
            for event, following in zip(self.events, after, strict=False)
        ]
        trace = Trace(
            num_prompt_tokens=len(prompt),
            tokens=torch.tensor(tokens),
            aux_states=torch.stack([self.rows[t][1] for t in range(length)]),
            output_token_ids=list(output),
            events=[
                DraftEvent(**event, accepted=count)
                for event, count in zip(self.events, [*accepted, None], strict=True)
            ],
        )
        self.rows, self.events = {}, []
        return trace


def observe(
    target: Path,
    *,
    head: Path,
    num_speculative_tokens: int,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    max_model_len: int = 512,
    speculative: dict[str, Any] | None = None,
    engine_args: dict[str, Any] | None = None,
) -> Observation:
    """Answer `prompts` greedily, one at a time, in an engine of this very process.

    Float32, eager, unchunked, no prefix cache, end-of-text ignored. Use a process of its own.

    Args:
        target: the target's folder.
        head: the draft head's folder.
        num_speculative_tokens: K.
        prompts: token ids; P + max_tokens + 2K must not pass max_model_len, or vLLM drafts zeros.
        max_tokens: of each answer.
        max_model_len: also the token budget of a step, so that no prompt is chunked.
        speculative: more keys for speculative_config. `{"rejection_sample_method": "synthetic",
            "synthetic_acceptance_rates": [..K..]}` accepts drafts of a random head at known rates.
        engine_args: more keywords for vllm.LLM, such as skip_tokenizer_init, or another dtype.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    drafting = {
        "method": "eagle3",
        "model": str(head),
        "num_speculative_tokens": num_speculative_tokens,
        **(speculative or {}),
    }
    llm = LLM(
        model=str(target),
        enforce_eager=True,
        seed=0,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_model_len,
        max_num_seqs=1,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        disable_log_stats=False,
        speculative_config=drafting,
        **{"dtype": "float32", **(engine_args or {})},
    )
    executor: Any = llm.llm_engine.model_executor  # in-process engines only
    recorder = _Recorder()
    recorder.attach(executor.driver_worker.worker.model_runner.drafter)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
    )
    before = _counters(llm)
    traces = []
    for prompt in prompts:
        given: Any = {"prompt_token_ids": list(prompt)}
        answer = llm.generate(given, sampling, use_tqdm=False)[0].outputs[0]
        traces.append(recorder.take(prompt, answer.token_ids))
    after = _counters(llm)
    drafts, draft_tokens, accepted = (after[0][i] - before[0][i] for i in range(3))
    per_pos = [late - early for late, early in zip(after[1], before[1], strict=True)]
    return Observation(traces, drafts, draft_tokens, accepted, per_pos)


def _counters(llm: Any) -> tuple[list[int], list[int]]:
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    scalars = [metrics[f"vllm:spec_decode_{name}"].value for name in names]
    return scalars, metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values


def observe_in_child(target: Path, **settings: Any) -> Observation:
    """`observe`, with the same keywords, in a child process; its log goes to stderr.

    Raises:
        RuntimeError: the child failed, with the last lines of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        order, result = Path(folder, "order.json"), Path(folder, "result.pt")
        order.write_text(json.dumps({"target": target, **settings}, default=str))
        command = [sys.executable, "-m", "tests.engine.train.proposer", str(order), str(result)]
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if child.returncode != 0:
            raise RuntimeError(f"the observed engine failed:\n{child.stderr[-4000:]}")
        loaded = torch.load(result, weights_only=True)
    traces = [
        Trace(**{**trace, "events": [DraftEvent(**event) for event in trace["events"]]})
        for trace in loaded.pop("traces")
    ]
    return Observation(traces=traces, **loaded)


def main(order: Path, result: Path) -> None:
    """Child process: carry out the order, save the observation as plain tensors and lists."""
    settings = json.loads(order.read_text())
    target, head = Path(settings.pop("target")), Path(settings.pop("head"))
    torch.save(asdict(observe(target, head=head, **settings)), result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
