# SPDX-License-Identifier: Apache-2.0
"""What an engine computes in, by the names that vLLM takes; transformers and TensorRT-LLM take them too."""

from typing import Literal

Dtype = Literal["auto", "bfloat16", "float16", "float32", "half", "float"]
