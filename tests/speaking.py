"""VLMs that say something: the published stand-ins babble, and a caption needs words."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import torch

from tests.published import write_qwen3_vl


def write_speaking_vlm(folder: Path, sentence: str = "an owl sits on a forest path") -> Path:
    """A whole Qwen3-VL that answers every question with ``sentence``, of words that are one token each, then ends.

    Its layers add nothing, so a state is the last token's embedding, and the head knows which token follows which.
    """
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    write_qwen3_vl(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    said = tokenizer(sentence).input_ids
    chain = [*tokenizer("<|im_start|>assistant\n").input_ids[-1:], *said, *tokenizer("<|im_end|>").input_ids]
    assert len(set(chain)) == len(chain) == len(sentence.split()) + 2, "each word one token, and none twice"
    language = model.model.language_model
    with torch.no_grad():
        for layer in language.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head = torch.zeros_like(model.lm_head.weight)
        for last, following in pairwise(chain):
            head[following] = language.norm(language.embed_tokens.weight[last])
    model.lm_head.weight = torch.nn.Parameter(head)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    return folder
