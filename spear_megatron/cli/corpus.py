"""``corpus``: tokenised conversations or stored trajectories as memory-mapped files, ``.npy`` files or a tar."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spear_megatron.data.sft import SftExample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``corpus`` to ``parser``."""
    source = (
        "JSONL of conversations; a run directory or checkpoint, whose replay buffer is taken; another corpus; or a tar "
        "of raw components 'ids' (int32) and 'loss_mask' (uint8)"
    )
    parser.add_argument("--source", type=Path, required=True, metavar="SOURCE", help=source)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder of the corpus")
    forms = "packed (Megatron .bin/.idx), numpy (one .npy per component) or webdataset (one tar); default: packed"
    parser.add_argument("--form", choices=("packed", "numpy", "webdataset"), default="packed", help=forms)
    model = "Hugging Face folder of the tokenizer (of a run: that of its model); needed unless SOURCE is a corpus"
    parser.add_argument("--model", metavar="FOLDER", help=model)
    longest = "leave out conversations and trajectories of more than N tokens"
    parser.add_argument("--max-length", type=int, metavar="N", help=longest)
    reward = "leave out trajectories of a smaller total reward"
    parser.add_argument("--min-reward", type=float, metavar="R", help=reward)


def run(args: argparse.Namespace) -> int:
    """Write the corpus, and say what is in it."""
    from spear_megatron.data.corpus_files import is_corpus, open_corpus
    from spear_megatron.data.corpus_write import write_corpus
    from spear_megatron.parallel.paths import check_output_folder

    check_output_folder(args.out, "--out", new=True)
    is_run = args.source.is_dir() and not is_corpus(args.source)
    if args.min_reward is not None and not is_run:
        raise ValueError("--min-reward belongs to stored trajectories: give a run directory as --source")
    if is_corpus(args.source):
        if args.model is not None:
            raise ValueError("--model does not change the tokens of a corpus: leave it away, or give their source")
        vocabulary = open_corpus(args.source).info.vocabulary_sha256
    else:
        vocabulary = _vocabulary(args)
    examples = read_examples(
        args.source, model=args.model, min_reward=args.min_reward, max_length=args.max_length
    )
    info = write_corpus(
        args.out, examples, form=args.form, source=str(args.source), vocabulary_sha256=vocabulary
    )
    print(
        f"wrote {args.out}: {info.num_samples} samples, {info.num_tokens} tokens, at most {info.longest} in one, as "
        f"{info.form}"
    )
    return 0


def read_examples(
    source: Path, *, model: str | None, min_reward: float | None, max_length: int | None
) -> Iterable[SftExample]:
    """Examples of whatever ``source`` is; those of more than ``max_length`` tokens are left out.

    Raises:
        ValueError: it is nothing that can be read, or something in it is damaged; names the file.
    """
    from spear_megatron.cli.agents import load_renderer
    from spear_megatron.data.corpus import examples_of
    from spear_megatron.data.corpus_files import is_corpus, open_corpus
    from spear_megatron.data.sft import encode_conversations, load_conversations

    if source.is_dir() and not is_corpus(source):
        return _trajectories(source, min_reward, max_length)
    if is_corpus(source):
        examples = examples_of(open_corpus(source))
    elif source.suffix == ".tar":
        examples = _of_tar(source)
    else:
        assert model is not None
        renderer = load_renderer(model)
        conversations = load_conversations([str(source)])
        examples = encode_conversations(conversations, renderer, max_length=2**31)
    return (example for example in examples if max_length is None or len(example.ids) <= max_length)


def _trajectories(path: Path, min_reward: float | None, max_length: int | None) -> Iterable[SftExample]:
    from spear_megatron.checkpoint.locate import find_checkpoint
    from spear_megatron.checkpoint.states import decode_states
    from spear_megatron.replay.export import stored_examples

    folder, manifest = find_checkpoint(path)
    states = decode_states(folder, manifest)
    if "replay" not in states:
        raise ValueError(f"{folder} holds no replay buffer: it is of a run without self-imitation")
    run_dir = folder.resolve().parents[1]
    return stored_examples(states["replay"], run_dir, min_reward=min_reward, max_length=max_length)


def _of_tar(path: Path) -> Iterable[SftExample]:
    import numpy as np
    import torch

    from spear_megatron.data.corpus_files import COMPONENTS, DTYPES
    from spear_megatron.data.sft import SftExample
    from spear_megatron.data.tar_index import scan_tar

    samples = scan_tar(path, COMPONENTS)
    content = np.memmap(path, dtype=np.uint8, mode="r")
    for sample in samples:
        parts = []
        for member, dtype in zip(sample, DTYPES, strict=True):
            if member.num_bytes % np.dtype(dtype).itemsize:
                raise ValueError(f"{path}: {member.name} has {member.num_bytes} bytes: it must hold {np.dtype(dtype)}")
            parts.append(content[member.offset : member.offset + member.num_bytes].view(dtype))
        ids, mask = parts
        if len(ids) != len(mask):
            raise ValueError(f"{path}: {sample[0].name} has {len(ids)} tokens and its loss_mask {len(mask)} values")
        yield SftExample(torch.from_numpy(ids.copy()), torch.from_numpy(mask.astype(np.bool_)))


def _vocabulary(args: argparse.Namespace) -> str:
    from spear_megatron.cli.agents import load_renderer
    from spear_megatron.data.chat import vocabulary_sha256

    if not args.source.exists():
        raise ValueError(f"--source={args.source} does not exist: check the path")
    if args.model is None:
        raise ValueError(f"{args.source} needs --model: the folder of the model whose tokenizer its tokens are of")
    return vocabulary_sha256(load_renderer(args.model).tokenizer)
