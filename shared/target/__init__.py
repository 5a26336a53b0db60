# SPDX-License-Identifier: Apache-2.0
"""The target: its configuration, weights, tokenizer and chat template."""
