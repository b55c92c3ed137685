"""Small checkpoints for tests and benches: every module of a family, a tokenizer laid out as the public ones, random weights."""

from __future__ import annotations

import json
from math import prod

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from optmem.model.config import ClipConfig, DecoderConfig, Family, ModelConfig, QueryConfig, StageOneConfig
from optmem.model.layout import packed_tensors
from optmem.text.tokenizer import BOS, DET, DET_END, EOS, GROUNDING, IMAGE, PAD, REF, REF_END

CORPUS = (
    "The quick brown fox jumps over the lazy dog. 0 12 345 6789 \n\n\tdef main(args): return [x for x in args]\n",
    "Füße, élan, naïve; 漢字 かな 한국어 Ελληνικά العربية עברית \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 <td>1</td>\n",
)
FRAMING = (BOS, EOS, PAD)  # the first ids, in the vocabulary too
TAGS = (IMAGE, REF, REF_END, DET, DET_END, GROUNDING, "<td>", "</td>", "<tr>", "</tr>", "<|User|>", "<|Assistant|>")
SPECIAL_PIECES = (*FRAMING, *TAGS)


def tokenizer_json(vocab_size: int = 400) -> bytes:
    """A byte-level BPE as DeepSeek's: framing tokens first, the trained pairs, the tags last, some of them not marked special."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = [("\\p{N}{1,3}", "isolated"), ("[一-龥぀-ゟ゠-ヿ]+", "isolated"), ("\\s+$| ?[^\\s\\p{L}\\p{N}]+", "isolated")]
    steps = [pre_tokenizers.Split(tokenizers.Regex(pattern), behavior) for pattern, behavior in split]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(FRAMING), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(TAGS[:6]))
    tokenizer.add_tokens(list(TAGS[6:]))
    return tokenizer.to_str().encode()


def special_ids(content: bytes) -> dict[str, int]:
    """Name to id of the added tokens of a tokenizer.json."""
    return {token["content"]: token["id"] for token in json.loads(content)["added_tokens"]}


def tiny_config(family: Family, *, vocab_size: int = 512, image_id: int = 400) -> ModelConfig:
    """A model with everything that its family has, and a few thousand weights."""
    is_v2 = family == "deepseek-ocr-2"
    decoder = DecoderConfig(
        vocab_size=vocab_size, hidden=32, layers=3, heads=4, dense_width=48, experts=4, expert_width=16, top_k=2,
        max_positions=2048, window=16 if family == "unlimited-ocr" else None,
    )  # fmt: skip
    return ModelConfig(
        family=family,
        stage_one=StageOneConfig(
            width=32, layers=2, heads=2, mlp_width=64, global_layers=(1,), window=3, table_side=8, neck_width=8, channels=(16, 32)
        ),
        clip=None if is_v2 else ClipConfig(width=32, layers=2, heads=2, mlp_width=64, table_side=4),
        query=QueryConfig(width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, query_counts=(9, 16)) if is_v2 else None,
        decoder=decoder,
        base_side=256,
        tile_side=192,
        image_id=image_id,
    )


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Weights as load_weights returns them, of the size that a trained model's have."""
    rng = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in packed_tensors(config).items():
        scale = (prod(shape[1:]) or 1) ** -0.5 if len(shape) > 1 else 1.0
        weights[name] = (torch.randn(shape, generator=rng) * scale).to(dtype)
    return weights
