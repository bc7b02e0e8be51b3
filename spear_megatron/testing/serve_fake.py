"""``python -m spear_megatron.testing.serve_fake``: a process that speaks SGLang's HTTP without a model."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence

from spear_megatron.model.shape import ModelShape
from spear_megatron.testing.fake_sglang import FakeSGLang


async def serve(host: str, port: int, vocab_size: int) -> None:
    """Serve until the process is killed."""
    async with FakeSGLang(vocab_size=vocab_size, context_length=4096, host=host, port=port):
        await asyncio.Event().wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Serve; the options are those of ``sglang.launch_server``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True, help="folder whose vocabulary size it takes")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000)
    parser.add_argument(
        "--bind-node", action="store_true", help="listen at SLURMD_NODENAME, where all nodes are this machine"
    )
    args = parser.parse_args(argv)
    host = os.environ["SLURMD_NODENAME"] if args.bind_node else args.host
    asyncio.run(serve(host, args.port, ModelShape.from_folder(args.model_path).vocab_size))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
