# SPDX-License-Identifier: Apache-2.0
"""What a stage leaves behind: manifests, checksums, shares, provenance, unfinished folders."""
