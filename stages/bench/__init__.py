# SPDX-License-Identifier: Apache-2.0
"""Measures a draft head in vLLM against the plain engine and the n-gram drafter."""
