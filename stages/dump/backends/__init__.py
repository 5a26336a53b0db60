# SPDX-License-Identifier: Apache-2.0
"""Backends: token ids in, hidden states out."""
