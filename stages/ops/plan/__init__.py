# SPDX-License-Identifier: Apache-2.0
"""A target planned from its config.json alone."""
