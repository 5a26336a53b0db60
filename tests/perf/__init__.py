# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: run by hand on a quiet machine, never by `make test`."""
