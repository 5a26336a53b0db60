# SPDX-License-Identifier: Apache-2.0
"""Tests that run whole stages, killed and shared out, with no engine: some minutes."""
