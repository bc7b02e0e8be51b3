"""Convert between Hugging Face folders and Megatron checkpoints, with any number of ranks; the same as ``convert``.

    python tools/convert_checkpoint.py hf-to-mcore --hf MODEL --out CHECKPOINTS
    torchrun --nproc-per-node 2 tools/convert_checkpoint.py mcore-to-hf --mcore CHECKPOINTS --out MODEL
    python tools/convert_checkpoint.py verify --hf MODEL --mcore CHECKPOINTS
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from spear_megatron.__main__ import main

    sys.exit(main(["convert", *sys.argv[1:]]))
