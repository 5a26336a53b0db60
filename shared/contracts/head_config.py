# SPDX-License-Identifier: Apache-2.0
"""The shape of a draft head, from a target's config.json or a head's own."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from shared.contracts.head_variant import CLASSIC, HeadVariant, stated_mask_token
from shared.contracts.rope import resolve_rope
from shared.errors import UserError

MAX_HEAD_DIM = 256  # of vLLM's attention backends


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The shape of a draft head. SiLU and no biases: engines load nothing else.

    `aux_layers` are in vLLM's numbering: id i is the state entering layer i of the target. `mask_token`
    is the target's id whose embedding a parallel head is fed after its first step; other heads have none.
    """

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    aux_layers: tuple[int, ...]
    rope_scaling: dict[str, Any] | None = None
    variant: HeadVariant = CLASSIC
    mask_token: int | None = None

    def __post_init__(self) -> None:
        wrong = {
            name: value
            for name, value in vars(self).items()
            if isinstance(value, int | float)
            and name != "mask_token"
            and not (value > 0 and math.isfinite(value))
        }
        if wrong:
            raise _refusal(
                f"expected sizes above 0, found {wrong}.",
                facts={key: str(value) for key, value in wrong.items()},
            )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads or self.hidden_size % heads or self.head_dim % 2:
            raise _refusal(
                "expected attention heads that divide hidden_size, key-value heads that divide "
                f"attention heads, and an even head_dim; found hidden_size {self.hidden_size}, "
                f"{heads} heads, {kv_heads} key-value heads, head_dim {self.head_dim}."
            )
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise draft_vocab_too_large(self.draft_vocab_size, self.vocab_size)
        tokens = range(self.vocab_size) if self.variant.parallel else (None,)
        if self.mask_token not in tokens:
            raise _refusal(
                f"expected a mask token below {self.vocab_size} if and only if the head drafts in "
                f"parallel, found {self.mask_token}."
            )
        if self.hidden_size != self.target_hidden_size:
            raise _refusal(
                f"expected the target's hidden size {self.target_hidden_size}, since engines share "
                f"the target's embeddings with the draft head; found {self.hidden_size}."
            )

    @property
    def num_parameters(self) -> int:
        """Weights of its own: fc, the layer, norms, lm_head. The embedding is the target's."""
        size, norms = self.hidden_size, 4 * self.hidden_size
        aux_norms = int(self.variant.fc_norm) + int(self.variant.norm_before_fc)
        aux_norms += int(self.variant.parallel)  # mask_hidden is as wide
        norms += aux_norms * len(self.aux_layers) * self.target_hidden_size
        norms += 2 * self.head_dim * int(self.variant.qk_norm)
        return self.num_matrix_parameters + norms + self.draft_vocab_size * size

    @property
    def num_matrix_parameters(self) -> int:
        """Weights of the matrices of fc and of the layer."""
        size, queries = self.hidden_size, self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        fc = size * len(self.aux_layers) * self.target_hidden_size
        attention = 2 * size * (queries + 2 * keys) + queries * size
        return fc + attention + 3 * size * self.intermediate_size

    @classmethod
    def from_json(
        cls,
        raw: Mapping[str, Any],
        *,
        aux_layers: tuple[int, ...],
        draft_vocab_size: int,
        variant: HeadVariant = CLASSIC,
        where: object = "config.json",
    ) -> "HeadConfig":
        """A head for the target whose config.json (its text part) is `raw`, or the head that `raw` is of.

        The target's shape, made legal where no Llama head may have it: attention heads that divide
        the hidden size, full rotary, a rope type that transformers and vLLM read alike.

        The mask token of a parallel head is the one that `raw` states, else the last id of the
        vocabulary: mostly a reserved token or padding of the embedding, which no text holds. A token of
        texts would do as well, since the state beside it tells the mask apart.

        Raises:
            UserError: a size is missing or no number, or the rope type is unknown.
        """
        with _refused(where):
            raw = _legal(raw)
            heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
            head_dim = int(raw.get("head_dim") or hidden // heads)
            theta, scaling = resolve_rope(raw, head_dim)
            mask_token = stated_mask_token(raw) if variant.parallel else None
            if variant.parallel and mask_token is None:
                mask_token = int(raw["vocab_size"]) - 1
            return cls(
                hidden_size=hidden,
                target_hidden_size=int(raw.get("target_hidden_size") or hidden),
                intermediate_size=int(raw["intermediate_size"]),
                num_attention_heads=heads,
                num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=head_dim,
                vocab_size=int(raw["vocab_size"]),
                draft_vocab_size=draft_vocab_size,
                rms_norm_eps=float(raw.get("rms_norm_eps") or 1e-6),
                rope_theta=theta,
                rope_scaling=scaling,
                max_position_embeddings=int(raw["max_position_embeddings"]),
                aux_layers=tuple(aux_layers),
                variant=variant,
                mask_token=mask_token,
            )


def _legal(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The target's config with attention heads that divide the hidden size.

    As many as the target has, or the next fewer. They keep its power of two, which tensor parallel
    sizes divide. Worked example: hidden 5120, 24 heads (8 * 3), 4 key-value heads: 16 heads.
    """
    hidden, wanted = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    if min(hidden, wanted) <= 0:
        raise ValueError(f"hidden_size {hidden} and num_attention_heads {wanted}")
    kv_heads = int(raw.get("num_key_value_heads") or wanted)
    fitting = [heads for heads in range(1, wanted + 1) if hidden % heads == 0]
    even = [heads for heads in fitting if heads % (wanted & -wanted) == 0]
    heads = max(even or fitting)
    head_dim = int(raw.get("head_dim") or hidden // heads)
    legal = {**raw, "num_attention_heads": heads, "head_dim": min(head_dim, MAX_HEAD_DIM)}
    legal["num_key_value_heads"] = math.gcd(heads, kv_heads)
    if isinstance(raw.get("intermediate_size"), list):  # one for each layer
        legal["intermediate_size"] = max(raw["intermediate_size"])
    return legal


def draft_vocab_too_large(draft_vocab_size: int, vocab_size: int) -> UserError:
    """The refusal of a draft vocabulary that the target does not have the tokens for."""
    return UserError(
        f"run.draft_vocab_size: expected 1 to {vocab_size} (the target's tokens), found "
        f"{draft_vocab_size}.",
        code="draft-vocab-size",
        remedy="Lower run.draft_vocab_size.",
        facts={"max": vocab_size, "found": draft_vocab_size},
    )


def _refusal(problem: str, facts: Mapping[str, Any] | None = None) -> UserError:
    return UserError(problem, code="head-shape", facts=facts)


@contextlib.contextmanager
def _refused(where: object) -> Iterator[None]:
    """Errors of a block as one refusal of the file `where`."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{where}: no draft head can have this shape: {error.problem}",
            code=error.code,
            remedy=error.remedy,
            facts={"file": str(where), **error.facts},
        ) from error
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{where}: expected the sizes of a decoder, found {found}.",
            code="head-config",
            remedy="Complete that config.json, or take a model whose own states them.",
            facts={"file": str(where)},
        ) from error
