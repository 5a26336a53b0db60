# SPDX-License-Identifier: Apache-2.0
"""What a target's own transformers class does between its last layer and its logits.

In: a parsed config. Out: the class's names for the embedding, layers, final norm and lm_head, whether
it ties them, and its norm and logit rules. No weight is read: the class is built on the meta device,
and its own code runs once on random numbers, so that a family nobody has listed falls out right or is
refused. Cost: about 0.2 s after the import of the class's module.

Legend: H hidden size, V vocabulary, n rows of a probe.
"""

import copy
import dataclasses
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from shared.errors import FOREIGN_ERRORS

# What code that meets a config it does not expect raises.
CLASS_ERRORS = (*FOREIGN_ERRORS, StrictDataclassError)
_ROWS = 3
_TOLERANCE = 1e-4


class UnknownRuleError(ValueError):
    """The class does something here that no rule describes."""


@dataclasses.dataclass(frozen=True)
class NormRule:
    """y = x_hat * (w + offset) + b, where x_hat is x, perhaps centred, over its root mean square."""

    is_centered: bool  # LayerNorm, as against RMSNorm
    offset: float  # 1 for Gemma's and Qwen3-Next's norms
    has_weight: bool
    has_bias: bool
    eps: float


@dataclasses.dataclass(frozen=True)
class ClassFacts:
    """What a class says of its output layer. The names are relative: `norm`, not `model.norm`.

    Attributes:
        ties: whether lm_head is the embedding unless the checkpoint has its own.
        logit_scale, softcap: logits = c * tanh(s * lm_head(y) / c), or s * lm_head(y) where c is None.
    """

    name: str
    embedding: str
    layers: str
    final_norm: str
    lm_head: str
    has_head_bias: bool
    ties: bool
    norm: NormRule
    logit_scale: float
    softcap: float | None

    def of(self, name: str, *, ties: bool) -> "ClassFacts":
        """The same facts for the class `name` around this one."""
        return dataclasses.replace(self, name=name, ties=ties)


def build(model_class: type[Any], config: Any) -> Any:
    """The class for this config on the meta device: all modules, no weights."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = model_class._from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager"
        )
    return model.eval()


def ties(model_class: type[Any], config: Any) -> bool:
    """Whether the class ties lm_head to the embedding.

    Raises:
        CLASS_ERRORS: the class does not take the config.
    """
    model = build(model_class, config)
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def probe(model_class: type[Any], config: Any) -> ClassFacts:
    """The facts of a transformers class for one config.

    Raises:
        UnknownRuleError: its norm or its logits follow none of the rules above.
        CLASS_ERRORS: the class does not take the config.
    """
    model = build(model_class, config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    owner = parent_of(model, head)
    decoder = parent_of(model, embedding)
    size, width = embedding.weight.shape
    names = _name_of(decoder, embedding), _name_of(owner, head)
    layers = _layers(decoder, config.get_text_config(decoder=True).num_hidden_layers)
    tied = head.weight is embedding.weight
    norm = _final_norm(decoder, layers, names[0], width)
    with torch.no_grad():
        scale, softcap = _logit_rule(owner, decoder, head, size, width)
        rule = norm_rule(norm, width)
    return ClassFacts(
        type(model).__name__,
        names[0],
        layers,
        _name_of(decoder, norm),
        names[1],
        getattr(head, "bias", None) is not None,
        tied,
        rule,
        scale,
        softcap,
    )


def _name_of(owner: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, child in owner.named_children() if child is wanted)


def parent_of(model: nn.Module, wanted: nn.Module) -> nn.Module:
    """The module that `wanted` is a direct child of.

    Raises:
        UnknownRuleError: there is none.
    """
    for module in model.modules():
        if any(child is wanted for child in module.children()):
            return module
    raise UnknownRuleError("its embedding or its lm_head is no module of its own")


def _layers(decoder: nn.Module, num_layers: int) -> str:
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return name
    raise UnknownRuleError(f"its decoder has no list of {num_layers} layers")


class _Rows(nn.Module):
    """Stands for an embedding: the same rows [1, n, H] whatever the ids."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = self.weight = rows

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.rows


def _final_norm(decoder: nn.Module, layers: str, embedding: str, width: int) -> nn.Module:
    """The module whose output is the decoder's: seen by running the decoder without its layers.

    Its embedding is left out too: that memory would be the only large one.
    """
    setattr(decoder, layers, nn.ModuleList())
    setattr(decoder, embedding, nn.Identity())
    decoder.to_empty(device="cpu")
    setattr(decoder, embedding, _Rows(torch.randn(1, _ROWS, width)))
    outputs: dict[nn.Module, Any] = {}
    hooks = [
        child.register_forward_hook(lambda module, _, output: outputs.update({module: output}))
        for child in decoder.children()
    ]
    ids = torch.zeros(1, _ROWS, dtype=torch.long)
    with torch.no_grad():
        final = decoder(input_ids=ids, use_cache=False)[0]
    for hook in hooks:
        hook.remove()
    for module, output in outputs.items():
        if isinstance(output, torch.Tensor) and output.data_ptr() == final.data_ptr():
            return module
    raise UnknownRuleError("something comes between its final norm and its lm_head")


def norm_rule(norm: nn.Module, width: int) -> NormRule:
    """How a norm module of width H computes, found by running it on random rows.

    Raises:
        UnknownRuleError: neither as an RMSNorm nor as a LayerNorm, offset or not.
    """
    parameters = dict(norm.named_parameters())
    if parameters.keys() - {"weight", "bias"}:
        raise UnknownRuleError(f"its final norm has the parameters {sorted(parameters)}")
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(width, generator=generator) + 0.5
    bias = torch.randn(width, generator=generator)
    values = {"weight": weight, "bias": bias}
    for name, parameter in parameters.items():
        parameter.data = values[name].clone()
    has_weight, has_bias = "weight" in parameters, "bias" in parameters
    rows = torch.randn(_ROWS, width, generator=generator) + 1.0
    large = rows * 1e3  # beside them no eps shows
    output = norm(large).float() - (bias if has_bias else 0.0)
    for is_centered in (False, True):
        centered = large - large.mean(-1, keepdim=True) if is_centered else large
        unit = centered / centered.square().mean(-1, keepdim=True).sqrt()
        for offset in (0.0, 1.0) if has_weight else (1.0,):
            factor = weight + offset if has_weight else torch.ones(width)
            if torch.allclose(unit * factor, output, rtol=1e-3, atol=1e-3):
                eps = _eps(norm, rows, is_centered, factor, bias if has_bias else None)
                return NormRule(is_centered, offset, has_weight, has_bias, eps)
    raise UnknownRuleError("its final norm is neither an RMSNorm nor a LayerNorm")


def _eps(
    norm: nn.Module,
    rows: torch.Tensor,
    is_centered: bool,
    factor: torch.Tensor,
    bias: torch.Tensor | None,
) -> float:
    """The eps in sqrt(mean square + eps), from rows so small that it decides the result."""
    if bias is not None:
        norm.bias.data.zero_()  # type: ignore[operator]  # it would drown the rest
    small = rows * 1e-5
    centered = small - small.mean(-1, keepdim=True) if is_centered else small
    output = norm(small).float()
    ratio = ((centered * factor).double() / output.double()).square()
    eps = (ratio.median(-1).values - centered.double().square().mean(-1)).mean()
    return float(f"{max(float(eps), 0.0):.3g}")


class _Decoder(nn.Module):
    """Stands for the text model, its parents included: the final states [1, n, H], nothing else."""

    def __init__(self, states: torch.Tensor, original: nn.Module) -> None:
        super().__init__()
        self.__dict__ |= {"states": states, "original": original}

    def forward(self, *_: Any, **__: Any) -> "_Output":
        return _Output(self.states)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.original, name)
        return self if isinstance(value, nn.Module) else value


class _Output(tuple[Any, ...]):
    """A model's output whose fields are empty, but for the states."""

    last_hidden_state: torch.Tensor

    def __new__(cls, states: torch.Tensor) -> "_Output":
        output = super().__new__(cls, (states,))
        output.last_hidden_state = states
        return output

    def __getattr__(self, _: str) -> None:
        return None


class _Head(nn.Module):
    """Stands for lm_head: keeps what it is given, answers with chosen logits [1, n, V]."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.weight = logits
        self.given: torch.Tensor | None = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.given = states
        return self.logits


def _logit_rule(
    owner: nn.Module, decoder: nn.Module, head: nn.Module, size: int, width: int
) -> tuple[float, float | None]:
    """(scale, softcap): the class's own forward, with stand-ins for the text model and lm_head."""
    states = torch.randn(1, _ROWS, width, generator=torch.Generator().manual_seed(0))
    inner = next(
        name
        for name, child in owner.named_children()
        if any(module is decoder for module in child.modules())
    )
    setattr(owner, inner, _Decoder(states, getattr(owner, inner)))
    # Rows: so small that no cap shows, as large as logits are, so large that nothing but the cap does.
    line = torch.linspace(-1, 1, size)
    stand_in = _Head(torch.stack([line * 1e-4, line * 50, line.sign() * 1e7])[None])
    setattr(owner, _name_of(owner, head), stand_in)
    logits = owner(input_ids=torch.zeros(1, _ROWS, dtype=torch.long), use_cache=False).logits
    given = stand_in.given
    if given is None or given.shape != states.shape or logits.shape != stand_in.logits.shape:
        raise UnknownRuleError("its logits are not its lm_head's")
    before = float((given / states).nanmedian())  # a state may be 0
    after = float((logits[0, 0] / stand_in.logits[0, 0]).nanmedian())
    largest = float(logits[0, 2].max())
    softcap = None if largest > 1e6 * after else float(f"{largest:.6g}")
    expected = stand_in.logits[0, :2] * after
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    is_right = torch.allclose(given, states * before, rtol=_TOLERANCE, atol=_TOLERANCE)
    if not is_right or not torch.allclose(logits[0, :2], expected, rtol=1e-3, atol=_TOLERANCE):
        raise UnknownRuleError("its logits are neither scaled nor softcapped ones of its lm_head")
    scale = before * after
    if not scale > 0:
        raise UnknownRuleError(f"it multiplies its logits by {scale}")
    return float(f"{scale:.6g}"), softcap
