# SPDX-License-Identifier: Apache-2.0
"""Stage dump: the target's hidden states over the rows of synth."""
