"""The tiny model folder: an ordinary Hugging Face one, reproducible, with Qwen's token rules."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from spear_megatron.data.tiny import (
    SPECIAL_TOKENS,
    TAG_TOKENS,
    build_tokenizer,
    conversation_texts,
    main,
    make_tiny_model,
)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_folder_loads_in_transformers_and_follows_the_seed(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = make_tiny_model(tmp_path / "a", seed=0)
    assert hashes(folder) == hashes(make_tiny_model(tmp_path / "b", seed=0))
    assert hashes(folder)["model.safetensors"] != hashes(make_tiny_model(tmp_path / "c", seed=1))["model.safetensors"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 100_000 < sum(weight.numel() for weight in model.parameters()) < 250_000
    assert model.dtype == torch.float32 and model.config.vocab_size == len(tokenizer)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ends and tokenizer.eos_token_id == ends[0]
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("What is 1 + 2?")])).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(tokenizer.encode("What is 1 + 2?")[1:]))
    assert abs(float(loss) - float(torch.log(torch.tensor(float(len(tokenizer)))))) < 1.0  # close to uniform


def test_sizes_are_arguments(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(
        tmp_path, seed=0, hidden_size=48, num_layers=2, num_heads=6, num_kv_heads=3, head_dim=10, intermediate_size=40,
        tie_embeddings=False, max_vocab_size=300, max_positions=99,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (60, 48) and len(model.model.layers) == 2
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    assert model.config.vocab_size == 300 and model.config.max_position_embeddings == 99


def test_tokenizer_keeps_text_and_splits_like_qwen() -> None:
    tokenizer = build_tokenizer(seed=0)
    text = "a  b\n\n12345 ünï 数 \U0001f600 don't \x00 </tool_call>\n<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("x = 1234")][-4:] == ["1", "2", "3", "4"]
    for token in SPECIAL_TOKENS + TAG_TOKENS:
        assert len(tokenizer.encode(token)) == 1
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert special == set(SPECIAL_TOKENS)  # as in Qwen: tags are ordinary text to skip_special_tokens


def test_vocabulary_has_room_for_all_bytes() -> None:
    with pytest.raises(ValueError, match="max_vocab_size must be at least 265"):
        build_tokenizer(seed=0, max_vocab_size=264)


def test_command_trains_the_tokenizer_on_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    rows = [{"messages": [{"role": "user", "content": "zebra quagga"}, {"role": "assistant", "content": "okapi"}]}] * 9
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert conversation_texts(path) == ["zebra quagga", "okapi"] * 9
    assert main([str(tmp_path / "model"), "--vocabulary", "300", "--conversations", str(path)]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer.encode("okapi")) == 1 and len(tokenizer.encode("What is 1 + 2?")) > 8
    path.write_text('{"messages": "zebra"}\n', encoding="utf-8")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "other"), "--conversations", str(path)])
    assert "texts.jsonl:1: 'messages' must be a list" in capsys.readouterr().err
