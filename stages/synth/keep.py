# SPDX-License-Identifier: Apache-2.0
"""Mode `keep`: the rows' own answers, tokenised and masked by the target's chat template.

No server, no GPU. Off-policy: the target would have answered otherwise, so expect less acceptance than
from regenerated answers.
"""

from pathlib import Path

from shared.conversations import reader
from shared.prompts.rows import Prompt
from shared.target.tokenizer import load_chat_tokenizer
from stages.synth.client import Outcome
from stages.synth.config import SynthConfig
from stages.synth.play import Refused


class Keeper:
    """Turns prompts that have answers into rows."""

    def __init__(self, config: SynthConfig, target: Path) -> None:
        tokenizer = load_chat_tokenizer(target, config.run, config.workspace)
        self._reader = reader.ConversationReader(tokenizer, config.run, config.special_token_text)

    def keep(self, prompt: Prompt) -> Outcome:
        """The prompt's rows, or why there are none."""
        try:
            return Outcome(prompt, tuple(self._reader.rows(prompt)))
        except reader.Refused as refused:
            return Outcome(prompt, refused=Refused(refused.reason, refused.detail))
