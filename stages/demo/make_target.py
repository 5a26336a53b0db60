# SPDX-License-Identifier: Apache-2.0
"""Make a small, real target model on the spot: the demo needs no model hub and no GPU.

Comes in: a folder to make, a seed. Goes out: a Llama in Hugging Face's layout with its own byte-level
BPE tokenizer and chat template, `prompts.jsonl` for synth, `held_out.jsonl` for bench (no prompt is
in two sets, nor in the target's own training text) and, last of all, `target.json`. It costs about
two minutes on two cores. Where float32 is the faster precision it trains in that, so the weights are
the same from run to run, but not on every machine.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from shared.errors import UserError
from shared.io.files import atomic_folder, read_json, write_json
from shared.runtime.process import stop_if_requested
from stages.demo.config import NOTHING_KEPT
from stages.demo.dialogues import Dialogue, dialogues
from stages.demo.model import build_model, build_tokenizer, opened
from stages.demo.training import DEFAULT_STEPS, batches, train

FACTS = "target.json"
MAX_ANSWER_TOKENS = 192
_TOKENIZER_DIALOGUES = 4000


@dataclasses.dataclass(frozen=True)
class TargetFacts:
    """What was made; the content of target.json beside the arguments."""

    parameters: int
    vocab_size: int
    steps: int
    final_loss: float
    mean_entropy_nats: float
    distinct_answers: float
    mean_answer_tokens: float
    seconds: float


def _stop_where_asked(ids: torch.Tensor, _scores: object, **_more: object) -> torch.Tensor:
    """A stopping criterion of generate(): never ends a row, but leaves on a signal."""
    stop_if_requested(NOTHING_KEPT)
    return torch.zeros(ids.shape[0], dtype=torch.bool)


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: Sequence[Dialogue]
) -> tuple[float, float, float]:
    """Greedy answers to `held_out`: (mean entropy in nats a token, share of distinct answers, tokens).

    The entropy is that of the target's whole next-token distribution at every token of its own
    answers, the end token included: the mean over tokens of -sum_v p_v log p_v.
    """
    model.eval()
    texts = [opened(dialogue) for dialogue in held_out]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    generated = model.generate(
        **inputs,
        max_new_tokens=MAX_ANSWER_TOKENS,
        stopping_criteria=[_stop_where_asked],
        return_dict_in_generate=True,
        output_logits=True,
    )
    answers = generated.sequences[:, inputs["input_ids"].shape[1] :]  # [N, T]
    counted = answers != tokenizer.pad_token_id
    log_p = torch.stack(generated.logits, dim=1).float().log_softmax(-1)  # [N, T, V]
    entropy = -(log_p.exp() * log_p).sum(-1)[counted].mean().item()
    distinct = len({tuple(row.tolist()) for row in answers}) / len(held_out)
    return entropy, distinct, counted.sum().item() / len(held_out)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    # The weights come with owner-only rights; a stage's container is another user.
    (folder / "model.safetensors").chmod(0o644)


def _write_prompts(path: Path, kept: Sequence[Dialogue], *, prefix: str) -> None:
    rows = [
        {"id": f"{prefix}-{index:05d}", "prompt": each.prompt, "category": each.category}
        for index, each in enumerate(kept)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _finished(out: Path, arguments: dict[str, float]) -> TargetFacts | None:
    """The facts of a target that was made with `arguments` before; None where nothing is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / FACTS).is_file():
        raise UserError(
            f"expected a new or empty folder at {out}, found other files and no {FACTS}.",
            code="target-folder-taken",
            remedy="Choose another folder, or empty this one.",
        )
    found = read_json(out / FACTS)
    try:
        before, facts = dict(found["arguments"]), TargetFacts(**found["facts"])
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"expected a target of make-target at {out}, found another command's.",
            code="target-folder-other",
            remedy="Choose another folder, or remove this one.",
            facts={"path": str(out)},
        ) from error
    if before != arguments:
        changed = [key for key in arguments if before.get(key) != arguments[key]]
        named = ", ".join(f"{key} (was {before.get(key)}, now {arguments[key]})" for key in changed)
        raise UserError(
            f"{out / FACTS}: expected a target made with the same arguments, found other {named}.",
            code="target-arguments",
            remedy="Delete the folder to make it anew, or choose another folder.",
        )
    return facts


def make_target(
    out: Path,
    *,
    seed: int = 0,
    steps: int = DEFAULT_STEPS,
    num_prompts: int = 1000,
    num_held_out: int = 96,
    hidden_size: int = 192,
    num_layers: int = 8,
    vocab_size: int = 1024,
    batch_rows: int = 20,
) -> TargetFacts:
    """Make the target in `out`, whole or not at all; at once where it is there already.

    Raises:
        UserError: `out` holds a target made with other arguments, or something else.
    """
    arguments = {key: value for key, value in locals().items() if key != "out"}
    if (facts := _finished(out, arguments)) is not None:
        return facts
    started_s = time.monotonic()
    stream = dialogues(seed=seed)
    held_out = list(itertools.islice(stream, num_held_out))
    prompts = list(itertools.islice(stream, num_prompts))
    training = list(itertools.islice(stream, _TOKENIZER_DIALOGUES))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        texts = (text for dialogue in training for text in (dialogue.prompt, dialogue.answer))
        tokenizer = build_tokenizer(texts, vocab_size=vocab_size)
        model = build_model(tokenizer, hidden_size=hidden_size, num_layers=num_layers)
        data = batches(tokenizer, itertools.chain(training, stream), rows=batch_rows)
        final_loss = train(model, data, steps=steps)
    model.to(torch.bfloat16)
    entropy, distinct, answer_tokens = measure(model, tokenizer, held_out)
    facts = TargetFacts(
        parameters=model.num_parameters(),
        vocab_size=len(tokenizer),
        steps=steps,
        final_loss=round(final_loss, 4),
        mean_entropy_nats=round(entropy, 4),
        distinct_answers=round(distinct, 4),
        mean_answer_tokens=round(answer_tokens, 1),
        seconds=round(time.monotonic() - started_s, 1),
    )
    with atomic_folder(out) as folder:
        _save(model, tokenizer, folder)
        _write_prompts(folder / "prompts.jsonl", prompts, prefix="demo")
        _write_prompts(folder / "held_out.jsonl", held_out, prefix="held-out")
        write_json(folder / FACTS, {"arguments": arguments, "facts": dataclasses.asdict(facts)})
    return facts
