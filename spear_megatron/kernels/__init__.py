"""The hot operations: Python faces of the compiled kernels (csrc/) and their eager equivalents."""

from __future__ import annotations

from spear_megatron.kernels.extension import available
from spear_megatron.kernels.linear_logprobs import linear_token_logprobs
from spear_megatron.kernels.logprobs import token_logprobs

__all__ = ["available", "linear_token_logprobs", "token_logprobs"]
