# SPDX-License-Identifier: Apache-2.0
"""Whether the draft head leaves the output as it was."""
