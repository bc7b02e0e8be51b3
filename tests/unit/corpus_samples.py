"""Made-up samples and corpora for tests of the data sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from spear_megatron.data.corpus_files import FORMS, FileCorpus, open_corpus
from spear_megatron.data.corpus_write import write_corpus
from spear_megatron.data.sft import SftExample


def made_up(count: int, longest: int = 40, seed: int = 0) -> list[SftExample]:
    """Examples of 2 to ``longest`` tokens; no two have the same ids."""
    random = np.random.default_rng(seed)
    examples = []
    for number, length in enumerate(random.integers(2, longest + 1, count)):
        ids = torch.from_numpy(random.integers(0, 1000, length).astype(np.int32))
        ids[0] = number
        mask = torch.from_numpy(random.integers(0, 2, length).astype(np.bool_))
        mask[0] = False
        examples.append(SftExample(ids, mask))
    return examples


def written(folder: Path, examples: list[SftExample], form: str, vocabulary: str = "v") -> FileCorpus:
    """The corpus ``folder/form``."""
    write_corpus(folder / form, examples, form=form, source="made up", vocabulary_sha256=vocabulary)
    return open_corpus(folder / form)


def all_forms(folder: Path, examples: list[SftExample]) -> dict[str, FileCorpus]:
    """One corpus of every form."""
    return {form: written(folder, examples, form) for form in FORMS}
