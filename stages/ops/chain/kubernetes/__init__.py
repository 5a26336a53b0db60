# SPDX-License-Identifier: Apache-2.0
"""The chain on a cluster: Jobs, their objects, and kubectl."""
