# SPDX-License-Identifier: Apache-2.0
"""Make a small, real target model on the spot: the demo needs no model hub and no GPU.

Comes in: a folder to make, a seed. Goes out: a Llama in Hugging Face's layout with its own byte-level
BPE tokenizer and chat template, `prompts.jsonl` for synth, `held_out.jsonl` for bench (no prompt is
in two sets, nor in the target's own training text) and, last of all, `target.json`. It costs about
two and a half minutes on two cores, five where the processor has no bfloat16 arithmetic: those train
in float32, and fewer steps, so the weights are the same from run to run, but not on every machine.
"""

import dataclasses
import functools
import itertools
import json
import logging
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shared.errors import UserError
from shared.files import atomic_folder, read_json, write_json
from stages.ops.demo.dialogues import Dialogue, dialogues
from stages.ops.demo.muon import Muon

logger = logging.getLogger(__name__)

FACTS = "target.json"
PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
# The end token lies inside the generation block: the target generates it, so the head must learn it.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
HEAD_SIZE = 64  # what vLLM's CPU attention likes best
MAX_LENGTH_TOKENS = 1024
MAX_ANSWER_TOKENS = 192
_TOKENIZER_DIALOGUES = 4000
_BATCHES_A_BUCKET = 2
_IGNORED = -100
_LOG_EVERY_STEPS = 50

Batch = tuple[torch.Tensor, torch.Tensor]  # token ids and labels, both int64 [B, T]


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


def build_tokenizer(texts: Iterator[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learnt from `texts`; digits stay single, so that sums can be learnt."""
    tokenizer = Tokenizer(models.BPE())
    by_digit = pre_tokenizers.Digits(individual_digits=True)
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_digit, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, num_layers: int
) -> LlamaForCausalLM:
    """A Llama with random weights, its vocabulary and ids those of `tokenizer`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // HEAD_SIZE),
        num_key_value_heads=1,
        head_dim=HEAD_SIZE,
        max_position_embeddings=MAX_LENGTH_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # Five times the usual spread: a tied embedding that starts small takes long to tell words apart.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    # At some hundred tokens a row plain products beat the fused attention's slow backward by a quarter.
    model.set_attn_implementation("eager")
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


def _opened(dialogue: Dialogue) -> str:
    return f"{USER}{dialogue.prompt}{END}{ASSISTANT}"


def batches(
    tokenizer: PreTrainedTokenizerFast, stream: Iterator[Dialogue], *, rows: int
) -> Iterator[Batch]:
    """Endless batches of `rows` dialogues, one a row, padded right; labels cover the answers alone.

    With a dialogue a row the causal mask keeps them apart. Rows are sorted by length within two
    batches only: kinds differ in length, and a batch of one kind sets learning back several times.
    """
    while True:
        bucket = list(itertools.islice(stream, rows * _BATCHES_A_BUCKET))
        prompts = tokenizer([_opened(dialogue) for dialogue in bucket])["input_ids"]
        answers = tokenizer([f"{dialogue.answer}{END}" for dialogue in bucket])["input_ids"]
        pairs = sorted(zip(prompts, answers, strict=True), key=lambda pair: len(pair[0] + pair[1]))
        for start in range(0, len(pairs), rows):
            group = pairs[start : start + rows]
            length = max(len(prompt + answer) for prompt, answer in group)
            ids = torch.full((len(group), length), tokenizer.pad_token_id)
            labels = torch.full((len(group), length), _IGNORED)
            for index, (prompt, answer) in enumerate(group):
                end = len(prompt + answer)
                ids[index, :end] = torch.tensor(prompt + answer)
                labels[index, len(prompt) : end] = torch.tensor(answer)
            yield ids, labels


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 (Zen 4 and later, Sapphire Rapids and later)."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


# Without bfloat16 a step takes three times as long; the target stays good enough to draft for.
DEFAULT_STEPS = 640 if has_bfloat16() else 400


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms.

    After 100 steps of Muon the loss is where AdamW alone brings it after 350.
    """
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(
            inner,
            lr=0.01,
            weight_decay=0.05,
            dtype=torch.bfloat16 if has_bfloat16() else torch.float32,
        ),
        torch.optim.AdamW(outer, lr=0.008, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def _rate(step: int, *, steps: int) -> float:
    """Share of the full learning rate at `step`: a short warm-up, then a cosine down to 3 %."""
    warm_up = (step + 1) / max(1, steps // 20)
    return min(warm_up, 0.515 + 0.485 * math.cos(math.pi * min(1.0, step / steps)))


def train(model: LlamaForCausalLM, data: Iterator[Batch], *, steps: int) -> float:
    """Train `model` in place; returns the mean loss (nats an answer token) of the last tenth."""
    optimizers = build_optimizers(model)
    rate = functools.partial(_rate, steps=steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in optimizers]
    model.train()
    losses: list[float] = []
    started_s, seen_tokens = time.monotonic(), 0
    for step in range(1, steps + 1):
        ids, labels = next(data)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bfloat16()):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            counted = labels[:, 1:] != _IGNORED
            logits = model.lm_head(hidden[counted])  # [answer tokens, V]
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][counted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        losses.append(loss.item())
        seen_tokens += ids.numel()
        if step % _LOG_EVERY_STEPS == 0 or step == steps:
            passed_s, recent = time.monotonic() - started_s, losses[-_LOG_EVERY_STEPS:]
            facts = (step, steps, statistics.fmean(recent), seen_tokens / passed_s)
            left_s = passed_s / step * (steps - step)
            logger.info("step %d of %d: loss %.3f, %.0f tokens/s, %.0f s left", *facts, left_s)
    return statistics.fmean(losses[-max(1, steps // 10) :])


@torch.no_grad()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: Sequence[Dialogue]
) -> tuple[float, float, float]:
    """Greedy answers to `held_out`: (mean entropy in nats a token, share of distinct answers, tokens).

    The entropy is that of the target's whole next-token distribution at every token of its own
    answers, the end token included: the mean over tokens of -sum_v p_v log p_v.
    """
    model.eval()
    texts = [_opened(dialogue) for dialogue in held_out]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    generated = model.generate(
        **inputs,
        max_new_tokens=MAX_ANSWER_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    answers = generated.sequences[:, inputs["input_ids"].shape[1] :]  # [N, T]
    counted = answers != tokenizer.pad_token_id
    log_p = torch.stack(generated.logits, dim=1).float().log_softmax(-1)  # [N, T, V]
    entropy = -(log_p.exp() * log_p).sum(-1)[counted].mean().item()
    distinct = len({tuple(row.tolist()) for row in answers}) / len(held_out)
    return entropy, distinct, counted.sum().item() / len(held_out)


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
            f"expected a new or empty folder at {out}, found other files and no {FACTS}. "
            "Choose another folder, or empty this one."
        )
    found = read_json(out / FACTS)
    before = found["arguments"]
    if before != arguments:
        changed = [key for key in arguments if before.get(key) != arguments[key]]
        named = ", ".join(f"{key} (was {before.get(key)}, now {arguments[key]})" for key in changed)
        raise UserError(
            f"{out / FACTS}: expected a target made with the same arguments, found other {named}. "
            "Delete the folder to make it anew, or choose another folder."
        )
    return TargetFacts(**found["facts"])


def make_target(
    out: Path,
    *,
    seed: int = 0,
    steps: int = DEFAULT_STEPS,
    num_prompts: int = 1200,
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
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        # The weights come with owner-only rights; a stage's container is another user.
        (folder / "model.safetensors").chmod(0o644)
        _write_prompts(folder / "prompts.jsonl", prompts, prefix="demo")
        _write_prompts(folder / "held_out.jsonl", held_out, prefix="held-out")
        write_json(folder / FACTS, {"arguments": arguments, "facts": dataclasses.asdict(facts)})
    return facts
