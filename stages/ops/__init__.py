# SPDX-License-Identifier: Apache-2.0
"""The operator's tools: run the chain, make the demo's target. Built and invoked like a stage."""
