# SPDX-License-Identifier: Apache-2.0
"""The demo's target: a small model, learnt on the spot."""
