# SPDX-License-Identifier: Apache-2.0
"""Looking at a run: status, validate, triage."""
