# SPDX-License-Identifier: Apache-2.0
"""The demo's target before it has learnt anything: its tokenizer, its chat template, its Llama."""

from collections.abc import Iterator

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages.demo.dialogues import Dialogue

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


def opened(dialogue: Dialogue) -> str:
    """A dialogue's text up to where the target answers, as the chat template has it."""
    return f"{USER}{dialogue.prompt}{END}{ASSISTANT}"
