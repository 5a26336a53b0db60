# SPDX-License-Identifier: Apache-2.0
"""Stage 1 of 4: the target answers prompts. In: prompts. Out: Parquet with exact token ids."""
