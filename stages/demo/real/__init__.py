# SPDX-License-Identifier: Apache-2.0
"""A pretrained target and prompts for it: from a hub, or from here where none can be reached."""
