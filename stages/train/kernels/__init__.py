# SPDX-License-Identifier: Apache-2.0
"""Attention, rotation and norms of the draft layer."""
