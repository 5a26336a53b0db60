# SPDX-License-Identifier: Apache-2.0
"""A pretrained target, and prompts for it, where no hub can be reached."""
