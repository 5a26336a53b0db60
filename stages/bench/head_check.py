# SPDX-License-Identifier: Apache-2.0
"""Refuses a draft head that vLLM would misread in silence, before an engine starts.

Two questions. `check` reads the head's config, the tensors' shapes and `d2t` in milliseconds: is it a
head of this target, with its aux layers in vLLM's numbering and offsets in `d2t`? `check_in_vllm` holds
the file's tensors to vLLM's own parameters, both ways. vLLM serves nearly anything: it leaves a
missing tensor as it was allocated and drops one whose flag is not set, without a line in the log.
What is certainly wrong is refused; what may be meant is a warning, in the log and in the report.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.contracts.head_folder import (
    DROPPED_WITHOUT_LOSS,
    Head,
    draft_token_ids,
    misread,
    read_head,
    require_fc,
    require_mask,
)
from shared.contracts.head_variant import read_variant
from shared.errors import RetryableError, UserError
from shared.io import files
from shared.runtime.children import wait_for_all
from shared.runtime.process import die_with_parent, end_group, stop_if_requested
from shared.target.model import TargetConfig
from stages.bench.measure.plans import Plan

# What to look at, by a part of the name that does not fit.
_HINTS = {
    "input_norm": "norm_before_fc says whether there is an input_norm.",
    "fc_norm": "fc_norm says whether there are such norms.",
    "mask_hidden": "mask_hidden is one row, as wide as the aux layers together.",
    "q_norm": "A layer with q_norm and k_norm needs model_type qwen3, any other has none.",
    "k_norm": "A layer with q_norm and k_norm needs model_type qwen3, any other has none.",
    "_proj.bias": "attention_bias and mlp_bias say whether there are biases.",
    "fc.": "eagle_config.use_aux_hidden_state must not be false; num_aux_hidden_states is the number "
    "of aux layers (default: that of eagle_config's list, else 3).",
    "embed_tokens": "A head narrower than its target needs an embedding of its own.",
    "lm_head": "A draft vocabulary smaller than the target's needs an lm_head of its own.",
    "mlp.": "intermediate_size must be the rows of mlp.gate_proj.",
    "model.": "vLLM adds `model.` to the names itself: rename the tensors.",
}
_GRACE_S = 5.0


def check(folder: Path, target: TargetConfig) -> list[str]:
    """The warnings for the report.

    Raises:
        UserError: the head is of another target, not whole, or certain to be misread by vLLM.
    """
    head = read_head(folder)
    _check_target(head, target)
    require_fc(head)
    require_mask(head)
    return [*_check_vocabulary(head, target), *_check_aux_layers(head, target), *_meant(head)]


def needed_settings(folder: Path) -> dict[str, Any]:
    """What vLLM's `speculative_config` must say of this head, since vLLM does not read it from there."""
    return {"parallel_drafting": True} if read_head(folder).config.get("parallel_drafting") else {}


def check_numbers(folder: Path) -> None:
    """Refuse a head that would draft the same token always; costs one reading of its weights.

    Raises:
        UserError: a tensor holds NaN or infinity.
    """
    head = read_head(folder)
    broken = [
        name for name, tensor in head.tensors().items() if not tensor.float().isfinite().all()
    ]
    if broken:
        raise misread(
            head,
            f"{', '.join(sorted(broken)[:5])}: NaN or infinity",
            "Export the head again, from a checkpoint before its loss was NaN.",
            tensors=sorted(broken),
        )


def _check_target(head: Head, target: TargetConfig) -> None:
    found = (head.config["vocab_size"], head.target_hidden_size)
    expected = (target.vocab_size, target.hidden_size)
    if found != expected:
        raise UserError(
            f"{head.folder}: expected a head for {target.folder} (vocabulary, hidden size "
            f"{expected}), found one for another target {found}.",
            code="head-of-another-target",
            remedy="Measure it with its own target.",
            facts={"head": str(head.folder), "expected": expected, "found": found},
        )
    if head.layout != "speculators" and head.config.get("target_hidden_size", 0) is None:
        raise misread(
            head,
            "target_hidden_size is null, which vLLM multiplies",
            "Remove the key from config.json, or set it to the target's hidden size.",
        )


def _check_vocabulary(head: Head, target: TargetConfig) -> list[str]:
    warnings = []
    tied, own = bool(head.config.get("tie_word_embeddings")), head.shapes.get("lm_head.weight")
    if own is None:
        warnings.append(
            "The head has no lm_head.weight: vLLM gives it the target's"
            + (", although its config ties it to the embedding." if tied else ".")
        )
    elif tied:
        warnings.append(
            "tie_word_embeddings is true: vLLM ignores it and uses the head's lm_head.weight; other "
            "engines tie. Set it to false."
        )
    if own and own[0] != head.draft_vocab_size:
        raise misread(
            head,
            f"draft_vocab_size is {head.draft_vocab_size}, lm_head.weight has {own[0]} rows",
            "Set draft_vocab_size in its config.json to the rows of lm_head.weight.",
        )
    draft_token_ids(head, target.vocab_size)
    return warnings


def _check_aux_layers(head: Head, target: TargetConfig) -> list[str]:
    own, nested = head.aux_layers, head.nested_aux_layers
    default = [2, target.num_layers // 2, target.num_layers - 3]
    used = own or nested or default
    if not own and nested and nested != default:
        raise misread(
            head,
            f"its aux layers {nested} stand in eagle_config alone, where vLLM takes them unshifted",
            "Add eagle_aux_hidden_state_layer_ids at the top of config.json: where they count the "
            f"layer whose output it is, {[layer + 1 for layer in nested]}, else {nested}.",
            nested=nested,
        )
    ascending = all(low < high for low, high in itertools.pairwise(used))
    if not ascending or used[0] < 0 or used[-1] > target.num_layers:
        raise misread(
            head,
            f"its aux layers {used} are not ascending within the target's {target.num_layers} layers",
            aux_layers=used,
        )
    fc = head.shapes.get("fc.weight", [])
    if fc and fc[-1] != len(used) * target.hidden_size:
        raise misread(
            head,
            f"fc.weight {fc} does not take the states of the {len(used)} aux layers {used}, "
            f"{target.hidden_size} wide each",
            aux_layers=used,
        )
    if not own and not nested:
        return [
            f"The head names no aux layers: vLLM takes {default}. Trained on others, it is misread."
        ]
    if own and nested and nested not in (own, [layer - 1 for layer in own]):
        return [
            f"eagle_config's aux layers {nested} are not the top-level {own}, which vLLM takes."
        ]
    return []


def _meant(head: Head) -> list[str]:
    warnings = []
    variant = read_variant(head.config)
    if variant.norm_output and not (variant.fc_norm or variant.norm_before_fc):
        warnings.append(
            "norm_output is true without EAGLE-3.1's other norms: vLLM feeds the normed state to the "
            "next draft step. A trainer that means another thing by it loses acceptance from position "
            "1 on."
        )
    if head.layout == "speculators" and "norm_before_residual" not in head.stated:
        taken = str(variant.norm_before_residual).lower()
        warnings.append(f"norm_before_residual is not given: in this layout vLLM takes {taken}.")
    return warnings


def check_in_vllm(plan: Plan, folder: Path, speculative: dict[str, Any], work: Path) -> None:
    """Hold the head's tensors to the parameters that vLLM builds for it, and the options to vLLM's own.

    Args:
        work: a folder for the question and the answer.

    Raises:
        UserError: vLLM refuses the head, leaves a parameter unwritten, drops a tensor, counts other
            aux layers, or knows no such option.
        RetryableError: the process that asks vLLM was killed.
        RuntimeError: it has a bug.
    """
    head = read_head(folder)
    question = {
        "target": str(plan.target),
        "trust_remote_code": plan.config.run.trust_remote_code,
        "dtype": plan.config.dtype,
        "max_model_len": plan.max_model_len,
        "engine_args": plan.config.engine_args,
        "speculative": speculative,
        "shapes": head.shapes,
    }
    answer = _ask(question, work)
    _check_options(plan, answer, speculative["num_speculative_tokens"])
    version = answer["vllm_version"]
    if refusal := answer.get("refusal"):
        raise UserError(
            f"vLLM {version} refuses the head {head.folder} with the target {plan.target}: "
            f"{refusal[:500]}.",
            code="head-refused-by-vllm",
            remedy="Mend the config.json that it names, or measure what this vLLM supports.",
            facts={"head": str(head.folder), "vllm": version, "refusal": refusal[:2000]},
        )
    if name := answer.get("without_hooks"):
        raise UserError(
            f"{plan.target}: expected a target whose class in vLLM {version} hands out hidden states "
            f"(SupportsEagle3), found {name}, to which no EAGLE-3 head can be served.",
            code="target-without-hooks",
            remedy="Set bench.engine_args: {model_impl: transformers}: vLLM's wrapper around "
            "transformers' class hands them out.",
            facts={"class": name, "vllm": version},
        )
    _check_parameters(head, answer)
    _check_fc_inputs(head, answer)


def _check_fc_inputs(head: Head, answer: Mapping[str, Any]) -> None:
    num_used = len(answer["aux_layers"] or (0, 0, 0))  # vLLM's own default is three layers
    if answer["num_aux_states"] not in (None, num_used):
        raise misread(
            head,
            f"vLLM {answer['vllm_version']} builds its fc for {answer['num_aux_states']} aux layers and "
            f"hands it {num_used}",
            _HINTS["fc."],
        )


def _check_options(plan: Plan, answer: dict[str, Any], depth: int) -> None:
    version = answer["vllm_version"]
    if unknown := answer["unknown_options"]:
        raise UserError(
            f"bench.engine_args: expected options of vLLM {version}, found {unknown}.",
            code="engine-options-unknown",
            remedy="Remove or rename them.",
            facts={"unknown": unknown, "vllm": version},
        )
    longest = answer["max_draft_length"]
    if max(plan.config.num_speculative_tokens, default=depth) > longest or depth > longest:
        raise UserError(
            f"bench.num_speculative_tokens: expected at most {longest}, which is what vLLM {version} "
            f"verifies at once, found {max(plan.config.num_speculative_tokens)}.",
            code="draft-too-long",
            remedy="Lower it; beyond the depth that the head was trained for, more seldom pays.",
            facts={"max": longest, "vllm": version},
        )


def _check_parameters(head: Head, answer: dict[str, Any]) -> None:
    dropped = [
        name for name in answer["dropped"] if not any(p in name for p in DROPPED_WITHOUT_LOSS)
    ]
    unwritten = answer["unwritten"]
    if answer["is_quantised"]:  # scales that the file leaves out have a neutral value
        ends = (".weight", ".bias", ".qweight", ".weight_packed")
        unwritten = {name: shape for name, shape in unwritten.items() if name.endswith(ends)}
    lines = [
        f"{name} is refused ({why.splitlines()[0]})" for name, why in answer["refused"].items()
    ]
    lines += [f"{name} is not read whole" for name in dropped]
    lines += [f"{name} {shape} stays as it was allocated" for name, shape in unwritten.items()]
    if lines:
        names = [*answer["refused"], *dropped, *unwritten]
        hints = {hint: None for part, hint in _HINTS.items() for name in names if part in name}
        raise misread(
            head,
            f"its tensors are not the parameters of vLLM {answer['vllm_version']}: {'; '.join(lines)}",
            " ".join(["Mend its config.json or export the head again.", *hints]),
            refused=answer["refused"],
            dropped=dropped,
            unwritten=unwritten,
        )


def _ask(question: dict[str, Any], work: Path) -> dict[str, Any]:
    question_path, answer_path = work / "head.question.json", work / "head.answer.json"
    files.write_json(question_path, question)
    answer_path.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.bench.ask_vllm", str(question_path), str(answer_path)],
        env={"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", **os.environ},
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    try:
        wait_for_all([process])
        stop_if_requested("nothing was measured yet")
    finally:
        end_group(process, grace_s=_GRACE_S)
    if process.returncode < 0:
        raise RetryableError(
            f"the process that asks vLLM about the head was ended by signal {-process.returncode}.",
            code="head-check-killed",
            remedy="Run the same command again, or give it more memory.",
        )
    if process.returncode != 0 or not answer_path.exists():
        raise RuntimeError(f"stages.bench.ask_vllm ended with code {process.returncode}")
    return dict(files.read_json(answer_path))
