# SPDX-License-Identifier: Apache-2.0
"""Captured states on disk."""
