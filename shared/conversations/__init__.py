# SPDX-License-Identifier: Apache-2.0
"""Finished conversations as token ids, with the proof of which tokens the assistant said."""
