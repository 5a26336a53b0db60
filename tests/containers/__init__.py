# SPDX-License-Identifier: Apache-2.0
"""Images, compose and manifests, built and run for real."""
