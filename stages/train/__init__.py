# SPDX-License-Identifier: Apache-2.0
"""Stage 3 of 4: train the draft head. In: dump's hidden states. Out: a head that vLLM serves."""
