"""A real SGLang server on a torch without CUDA: run this file with the Python of an environment that holds sglang.

    .venv-sglang/bin/python spear_megatron/rollout/sglang/serve_cpu.py --model-path DIR --port PORT --device cpu ...

The wheels assume CUDA at import. Two kinds of names are supplied before SGLang is imported, none of which a language
model on the CPU ever calls: the schemas of two torchvision operators (its library is a CUDA build, which does not load
here), and the functions of `sgl_kernel` that speculative decoding imports (its CPU build is not published). No kernel
and no behaviour is replaced. The file imports nothing of this package; SGLang's worker processes run it again as
``__mp_main__``.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import Any

_SPECULATIVE_DECODING = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)
_KEPT: list[Any] = []  # a torch.library.Library withdraws its operators when it is collected


def supply_missing_names() -> None:
    """Make `import sglang` possible in this process."""
    import torch

    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    _KEPT.append(library)
    kernels = types.ModuleType("sgl_kernel")
    for name in _SPECULATIVE_DECODING:
        setattr(kernels, name, _refusal(name))
    sys.modules.setdefault("sgl_kernel", kernels)


def _refusal(name: str) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"sgl_kernel.{name} has no CPU build: speculative decoding needs a GPU")

    return refuse


def main(arguments: list[str]) -> None:
    """Serve until terminated; ``arguments`` are those of `sglang.launch_server`."""
    from sglang.launch_server import run_server  # type: ignore[import-not-found, unused-ignore]
    from sglang.srt.plugins import load_plugins  # type: ignore[import-not-found, unused-ignore]
    from sglang.srt.server_args import prepare_server_args  # type: ignore[import-not-found, unused-ignore]
    from sglang.srt.utils import kill_process_tree  # type: ignore[import-not-found, unused-ignore]

    load_plugins()
    try:
        run_server(prepare_server_args(arguments))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ in ("__main__", "__mp_main__"):
    supply_missing_names()
if __name__ == "__main__":
    main(sys.argv[1:])
