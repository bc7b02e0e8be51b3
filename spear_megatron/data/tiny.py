"""A small tokenizer and a small Qwen3 model, made offline: what the quickstart trains and the tests load.

The folder is an ordinary Hugging Face one: ``AutoTokenizer`` and ``AutoModelForCausalLM`` load it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from spear_megatron.data.generator import LEVELS, draw_problems
from spear_megatron.data.jsonl import read_jsonl
from spear_megatron.parallel.paths import check_output_folder, os_error_text
from spear_megatron.parallel.seeds import derive_key, generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3Config

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAG_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

# Qwen2's pre-tokenizer: words take the character before them, digits stand alone.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The format of Qwen2.5's template with short fixed texts: a tool is shown as name(arguments).
CHAT_TEMPLATE = """\
{%- if tools or messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + ('\\n\\n' if tools else '') }}
    {%- endif %}
    {%- if tools %}
        {{- 'Tools:' }}
        {%- for tool in tools %}
            {{- '\\n' + tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' + ('\\n' + message.content if message.content else '') }}
        {%- for call in message.tool_calls %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def make_tiny_model(
    out_dir: str | Path,
    *,
    seed: int,
    hidden_size: int = 96,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 24,
    intermediate_size: int = 192,
    max_positions: int = 2048,
    tie_embeddings: bool = True,
    max_vocab_size: int = 512,
    texts: Sequence[str] | None = None,
) -> Path:
    """Write a tokenizer and a randomly initialised fp32 Qwen3 model to ``out_dir`` and return it.

    The default has about 0.2 M parameters. The vocabulary holds at most ``max_vocab_size`` tokens, at least 265; it
    is trained on ``texts``, or on those of the built-in arithmetic tasks. Equal arguments give equal files.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(seed=seed, max_vocab_size=max_vocab_size, texts=texts)
    tokenizer.save_pretrained(folder)
    config = _model_config(
        tokenizer,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_embeddings,
    )
    config.save_pretrained(folder)
    save_file(_initial_weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    GenerationConfig(eos_token_id=ends, pad_token_id=ends[1], do_sample=True).save_pretrained(folder)
    return folder


def build_tokenizer(
    *, seed: int, max_vocab_size: int = 512, texts: Sequence[str] | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's split and control tokens, trained on ``texts`` or those of the built-in tasks."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    added = len(SPECIAL_TOKENS) + len(TAG_TOKENS)
    if max_vocab_size < len(alphabet) + added:
        raise ValueError(f"max_vocab_size must be at least {len(alphabet) + added}, got {max_vocab_size}")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab_size - added, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_corpus(seed) if texts is None else ("system\nuser\nassistant\n", *texts), trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAG_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def _corpus(seed: int) -> Iterator[str]:
    """The fixed texts of a conversation, often, and the texts and programs of the tasks."""
    call = json.dumps({"name": "code_interpreter", "arguments": {"code": "print(1)"}})
    fixed = f"system\nTools:\ncode_interpreter(code)\nuser\nassistant\n{call}\n\n1\n\\boxed{{1}}"
    rng = Random(derive_key(seed, "tiny/corpus"))
    for problem in draw_problems(rng, levels=LEVELS, count=1000, split="train"):
        program = json.dumps({"name": "code_interpreter", "arguments": {"code": problem.program}})
        yield from (fixed, problem.text, program, f"\\boxed{{{problem.answer}}}")


def _model_config(tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> Qwen3Config:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        architectures=["Qwen3ForCausalLM"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
        **sizes,
    )


def _initial_weights(config: Qwen3Config, seed: int) -> dict[str, torch.Tensor]:
    """Weights by Hugging Face name: norms 1, matrices normal, each from a generator of its own name."""
    from transformers import Qwen3ForCausalLM

    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Qwen3ForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    weights = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
            continue
        std = 0.02 if "embed_tokens" in name else 1 / math.sqrt(shape[1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.num_hidden_layers)
        weights[name] = torch.randn(shape, generator=generator(seed, "tiny/weights", index)) * std
    return weights


def conversation_texts(path: str | Path) -> list[str]:
    """The texts of all messages in a JSONL file of conversations (``messages``), for ``texts`` above.

    Raises:
        ValueError: the file cannot be read or a row is no conversation; names file and line.
    """
    texts = []
    for where, row in read_jsonl(path):
        messages = row.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"{where}: 'messages' must be a list of objects")
        texts += [message["content"] for message in messages if isinstance(message.get("content"), str)]
    return texts


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m spear_megatron.data.tiny OUT``: write the model folder."""
    parser = argparse.ArgumentParser(prog="python -m spear_megatron.data.tiny", description=__doc__)
    parser.add_argument("out", help="folder of the model")
    parser.add_argument("--seed", type=int, default=0, help="keys the weights and the tokenizer's corpus")
    parser.add_argument("--vocabulary", type=int, default=512, help="most tokens of the tokenizer")
    parser.add_argument("--conversations", help="JSONL file of messages whose texts the tokenizer is trained on")
    args = parser.parse_args(argv)
    try:
        check_output_folder(args.out, "OUT")
        texts = None if args.conversations is None else conversation_texts(args.conversations)
        folder = make_tiny_model(args.out, seed=args.seed, max_vocab_size=args.vocabulary, texts=texts)
    except (ValueError, OSError) as error:
        told = os_error_text(error) if isinstance(error, OSError) else str(error)
        if told is None:
            raise
        parser.error(told)
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
