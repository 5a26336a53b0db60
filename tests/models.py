# SPDX-License-Identifier: Apache-2.0
"""Tiny random targets, made in code: a folder that HF and vLLM both load, tokenizer included.

In: a folder. Out: the same folder with config, bf16 weights and a byte-level tokenizer. Costs under
a second. The surprise: default initialisation (std 0.02) would leave every layer a near-identity,
so that neighbouring hidden states agree and an off-by-one stays unseen. Here every layer moves the
state by some 15 to 30 %, and norm weights are spread around 1, so that each layer and norm shows.
"""

import pydoc_data.topics
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 512
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(path: Path, *, vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` entries, learnt from Python's own help texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())][:20]
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(path)
    return tokenizer


def tiny_llama(path: Path, *, tied: bool = True, seed: int = 0, **size: int) -> Path:
    """A Llama target with random bf16 weights, `tied` or not, in `path`."""
    config = LlamaConfig(**_shape(**size), tie_word_embeddings=tied)
    return _save(LlamaForCausalLM(config), path, seed=seed)


def tiny_qwen3(path: Path, *, tied: bool = False, seed: int = 0, **size: int) -> Path:
    """A Qwen3 target (norms on queries and keys) with random bf16 weights in `path`."""
    config = Qwen3Config(**_shape(**size), tie_word_embeddings=tied)
    return _save(Qwen3ForCausalLM(config), path, seed=seed)


def tiny_sliding(path: Path, *, window: int = 48, seed: int = 0, **size: int) -> Path:
    """A Mistral target whose tokens see the last `window` tokens alone, in `path`."""
    config = MistralConfig(**_shape(**size), sliding_window=window)
    return _save(MistralForCausalLM(config), path, seed=seed)


def tiny_moe(path: Path, *, seed: int = 0, **size: int) -> Path:
    """A Qwen3-MoE target, two of four experts a token, in `path`."""
    shape = _shape(**size)
    config = Qwen3MoeConfig(
        **shape,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=shape["hidden_size"],
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
    )
    return _save(Qwen3MoeForCausalLM(config), path, seed=seed)


def tiny_scaled_rotary(path: Path, *, seed: int = 0, **size: int) -> Path:
    """A Llama target with Llama 3's own scaling of the rotary frequencies, in `path`."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(**_shape(**size), tie_word_embeddings=False, rope_parameters=scaling)
    return _save(LlamaForCausalLM(config), path, seed=seed)


def _shape(
    *,
    hidden_size: int = 128,
    num_layers: int = 8,
    vocab_size: int = VOCAB_SIZE,
    max_length_tokens: int = 2048,
) -> dict[str, int | None]:
    """Every target's sizes, by the names that these functions take them under."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 64,
        "head_dim": 32,
        "max_position_embeddings": max_length_tokens,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        "pad_token_id": SPECIAL_TOKENS.index("<|pad|>"),
    }


def _save(model: PreTrainedModel, path: Path, *, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            elif "embed_tokens" in name:
                # 0.3: a state of unit scale gives logits of std 0.3 sqrt(H), peaked but not one-hot.
                weight.normal_(0.0, 0.3, generator=generator)
            else:
                # 0.15 on what is added to the residual stream: more would let bf16's rounding grow
                # from layer to layer until a test of 2 % had no room left.
                added = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
                gain = 0.15 if name.endswith(added) else 1.0
                # The last axis is what is summed over, in the experts' [E, out, in] too.
                weight.normal_(0.0, gain * weight.shape[-1] ** -0.5, generator=generator)
    model.to(torch.bfloat16).save_pretrained(path)
    tiny_tokenizer(path, vocab_size=model.config.vocab_size)
    return path
