# SPDX-License-Identifier: Apache-2.0
"""The four stages and the operator's tools; none imports another."""
