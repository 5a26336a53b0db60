# SPDX-License-Identifier: Apache-2.0
"""Engines started, loaded and measured."""
