# SPDX-License-Identifier: Apache-2.0
"""Figures from vLLM's counters and the client's clock."""
