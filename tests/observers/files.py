"""Inputs of the observers: two tiny models, tasks and conversations."""

from __future__ import annotations

import json
from pathlib import Path


def make_files(folder: Path) -> None:
    """Write ``model`` and ``other_model`` (4 layers), ``tasks.jsonl`` and ``talks.jsonl``."""
    from spear_megatron.data.tiny import make_tiny_model

    sizes = {"hidden_size": 32, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 64}
    for seed, name in enumerate(("model", "other_model")):
        make_tiny_model(folder / name, seed=seed, **sizes)
    tasks = [{"id": str(i), "problem": f"What is {i} + {i}?", "answer": 2 * i} for i in range(3)]
    pairs = [(f"Say {i}.", str(i)) for i in range(3)]
    talks = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    for name, rows in (("tasks", tasks), ("talks", talks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
