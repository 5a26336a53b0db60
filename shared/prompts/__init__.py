# SPDX-License-Identifier: Apache-2.0
"""Prompts: where rows come from, and what a row is."""
