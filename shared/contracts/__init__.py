# SPDX-License-Identifier: Apache-2.0
"""What two stages must agree on: rows, hidden states, vocabulary, layers, heads, reports."""
