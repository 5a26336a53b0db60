# SPDX-License-Identifier: Apache-2.0
"""Random-weight EAGLE-3 heads for any target folder, laid out as `export/` promises.

In: a target's folder (its config.json alone is read). Out: a folder with `config.json` and
`model.safetensors` that vLLM serves. Costs milliseconds on small targets. The surprise: the weights
are random but drawn wide enough that the logits spread, so that an argmax is never a coin toss.

Shapes: V target vocab, D draft vocab, H hidden, A aux layers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shared.contracts.head_config import HeadConfig
from shared.contracts.head_folder import read_head
from shared.contracts.head_variant import read_variant
from shared.contracts.layers import resolve_aux_layers, to_output_ids
from stages.train.model import DraftHead

# Standard deviation of every matrix times sqrt(fan-in): each layer keeps its input's scale.
GAIN = 1.0


def head_config(
    target: dict[str, Any], *, draft_vocab_size: int, aux_layers: tuple[int, ...]
) -> dict[str, Any]:
    """The head's config.json for a Llama-like target's: an allow-list, no null, one layer."""
    hidden, heads = target["hidden_size"], target["num_attention_heads"]
    rope = target.get("rope_parameters") or {
        "rope_type": "default",
        "rope_theta": target.get("rope_theta", 10000.0),
    }
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": hidden,
        "target_hidden_size": hidden,
        "intermediate_size": target["intermediate_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": target.get("num_key_value_heads", heads),
        "head_dim": target.get("head_dim") or hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": target["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "rope_parameters": rope,
        "max_position_embeddings": target["max_position_embeddings"],
        "vocab_size": target["vocab_size"],
        "draft_vocab_size": draft_vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "norm_before_residual": False,
        "dtype": "float32",
        "eagle_aux_hidden_state_layer_ids": list(aux_layers),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": to_output_ids(aux_layers),
            "use_aux_hidden_state": True,
        },
    }


def random_weights(config: dict[str, Any], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of the head that `config` describes, float32, by its exported name."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, head_dim = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    draft, vocab = config["draft_vocab_size"], config["vocab_size"]
    aux = len(config["eagle_aux_hidden_state_layer_ids"])

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (GAIN / columns**0.5)

    def scale() -> torch.Tensor:
        # Away from 1, so that a forgotten norm weight shows.
        return 1.0 + 0.2 * torch.randn(hidden, generator=generator)

    weights = {
        "fc.weight": matrix(hidden, aux * hidden),
        "midlayer.input_layernorm.weight": scale(),
        "midlayer.hidden_norm.weight": scale(),
        "midlayer.self_attn.q_proj.weight": matrix(queries, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": matrix(keys, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": matrix(keys, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": matrix(hidden, queries),
        "midlayer.post_attention_layernorm.weight": scale(),
        "midlayer.mlp.gate_proj.weight": matrix(inner, hidden),
        "midlayer.mlp.up_proj.weight": matrix(inner, hidden),
        "midlayer.mlp.down_proj.weight": matrix(hidden, inner),
        "norm.weight": scale(),
        "lm_head.weight": matrix(draft, hidden),
    }
    if draft < vocab:
        kept = torch.randperm(vocab, generator=generator)[:draft].sort().values  # [D] ascending
        weights["d2t"] = kept - torch.arange(draft)  # int64 offsets
        weights["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, kept, True)  # [V]
    return weights


def write_random_head(
    folder: Path,
    *,
    target: Path,
    draft_vocab_size: int | None = None,
    aux_layers: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Path:
    """Write a random head for the target in `target` into `folder`, and return `folder`.

    Args:
        folder: made where it is missing.
        target: a folder with a Llama-like config.json.
        draft_vocab_size: D; the target's V where None, and then without d2t and t2d.
        aux_layers: vLLM's numbering; the default three where None.
        seed: equal seeds give equal heads.
    """
    of_target = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config = head_config(
        of_target,
        draft_vocab_size=draft_vocab_size or of_target["vocab_size"],
        aux_layers=resolve_aux_layers(aux_layers, of_target["num_hidden_layers"]),
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(random_weights(config, seed=seed), folder / "model.safetensors", {"format": "pt"})
    return folder


def load_head(folder: Path, embed_tokens: torch.Tensor) -> DraftHead:
    """The head in an exported folder, in its own dtype, on the target's embeddings [V, H]."""
    found = read_head(folder)
    weights = found.tensors()
    config = HeadConfig.from_json(
        found.config,
        aux_layers=tuple(found.aux_layers or ()),
        draft_vocab_size=found.draft_vocab_size,
        variant=read_variant(found.config),
    )
    head = DraftHead(config, embed_tokens=embed_tokens, d2t=weights.get("d2t"))
    head.to(weights["fc.weight"].dtype).load_state_dict(weights)
    return head


def draft_logits(
    head: DraftHead,
    tokens: torch.Tensor,
    states: torch.Tensor,
    *,
    num_steps: int,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """Teacher-forced logits [K, R, D] of one document; row (k, t) proposes token t + 2 + k.

    `slots` are all by default. The last token stands in for those after the end.
    """
    slots = torch.arange(len(states)) if slots is None else slots
    offsets = torch.tensor([0, len(states)])
    hidden = head(tokens, states, offsets=offsets, slots=slots, num_steps=num_steps)
    return head.lm_head(head.to_lm_head(torch.stack(hidden)))
