# SPDX-License-Identifier: Apache-2.0
"""What a target is, from its config.json: its kind, and the sizes that a plan needs.

What the file leaves out comes from the target's class in transformers.
"""

import dataclasses
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.target.model import TargetConfig, parse_config
from stages.ops.chain.served import architecture, is_latent, is_vision, keeps_states

# Names under which configs give the number of experts, and of those that a token meets.
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_ACTIVE = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A target's config.json, understood as far as a plan needs it.

    Attributes:
        target: the config as the stages read it.
        text: the settings of its text model, its class's defaults included.
        unknown: why transformers has no class for it; empty where it has one.
    """

    target: TargetConfig
    text: dict[str, Any]
    unknown: str

    @property
    def raw(self) -> dict[str, Any]:
        """The whole config.json."""
        return self.target.whole

    @property
    def name(self) -> str:
        """The class that serves it."""
        return architecture(self.target) or "unknown"

    def size(self, name: str, *, by_layer: bool = False) -> int:
        """A whole number of the text model's settings; 0 where there is none.

        Args:
            by_layer: whether it may be a list with a number for each layer, of which the largest counts.

        Raises:
            UserError: it is something else.
        """
        value = self.text.get(name) or 0
        try:
            listed = value if by_layer and isinstance(value, list) else [value]
            numbers = [int(each) for each in listed]
            if numbers != [float(each) for each in listed] or min(numbers) < 0:
                raise ValueError(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise self.refused(name, "a whole number", value) from error
        return max(numbers)

    def refused(self, name: str, expected: str, found: object) -> UserError:
        """The refusal of a setting that is something else than expected."""
        return UserError(
            f"{self.target.folder}/config.json: expected {expected} as {name}, found {found!r}.",
            code="plan-config-setting",
            remedy="Restore the file as it was published.",
            facts={"setting": name, "found": repr(found)},
        )

    @property
    def num_heads(self) -> int:
        return self.size("num_attention_heads")

    @property
    def num_experts(self) -> int:
        return self._first(_EXPERTS)

    @property
    def active_experts(self) -> int:
        return self._first(_ACTIVE)

    def _first(self, names: tuple[str, ...]) -> int:
        return next(filter(None, (self.size(name, by_layer=True) for name in names)), 0)

    @property
    def expert_width(self) -> int:
        """Width of one expert's MLP; 0 for a dense target."""
        if not self.num_experts:
            return 0
        return self._first(("moe_intermediate_size", "intermediate_size"))

    @property
    def is_mla(self) -> bool:
        return is_latent(self.target)

    @property
    def is_vlm(self) -> bool:
        return is_vision(self.target)

    @property
    def window(self) -> int | None:
        """Tokens that a sliding-window layer sees, where there is such a layer."""
        if not self.text.get("sliding_window") or self.text.get("use_sliding_window") is False:
            return None
        kinds = self.text.get("layer_types")
        return self.size("sliding_window") if not kinds or "sliding_attention" in kinds else None

    @property
    def is_hybrid(self) -> bool:
        """Whether some layers keep a state instead of keys and values."""
        return keeps_states(self.text)

    @property
    def kinds(self) -> list[str]:
        """What a person calls it."""
        named = {
            "VLM": self.is_vlm,
            "sliding window": self.window,
            "MLA": self.is_mla,
            "hybrid": self.is_hybrid,
            "custom code": self.raw.get("auto_map"),
        }
        return [
            "MoE" if self.num_experts else "dense",
            *(name for name, is_so in named.items() if is_so),
        ]

    @property
    def quantization(self) -> dict[str, Any]:
        found = [part.get("quantization_config") for part in self.target.parts]
        return next((each for each in found if isinstance(each, dict)), {})


def understand(raw: object, where: str) -> Architecture:
    """The architecture of a parsed config.json.

    Raises:
        UserError: it is no decoder's, or lacks a size that neither file nor class gives.
    """
    target = parse_config(raw, Path(where))
    unknown = ""
    try:
        text = target.settings
    except UserError as error:
        unknown = error.problem
        text = {key: value for key, value in target.raw.items() if value is not None}
    widths = ("intermediate_size", "moe_intermediate_size")
    has_width = any(isinstance(text.get(key), int | list) for key in widths)
    if not has_width or not isinstance(text.get("num_attention_heads"), int):
        raise UserError(
            f"{where}: expected a decoder's config.json, found no num_attention_heads or no "
            "intermediate_size in it.",
            code="plan-config-sizes",
            remedy="Give the config of the whole model, as from_pretrained reads it.",
            facts={"where": where},
        )
    return Architecture(target, text, unknown)
