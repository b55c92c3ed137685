"""What dtype="fp8" costs: vision tokens of 8-bit floats beside bf16's own error, and what nano says of them.

    python bench/fp8_error.py [pages of a kind] [v1, prose, code, shuffled, characters, symbols: all]

Features: relative rms of the difference and mean cosine of a token, bf16 against fp32 and fp8 against bf16, for nano on held-out
pages and for a random V1 of full size; logits for its decoder at half of its sizes.  Reading: greedily, token by token, how many
symbols and rows are those that bf16 says; beside it fp32, and 8 bits in the encoder or in the decoder alone.  All on a CPU, through
the reference: a GPU's kernels sum in another order.  One line of JSON last.
"""

import json
import sys
from copy import copy
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

from optmem.engine.checkpoint import find_checkpoint
from optmem.model.cache import Cache
from optmem.model.config import scaled
from optmem.model.config_json import public_config
from optmem.model.encoder import Encoder
from optmem.model.model import Model
from optmem.model.quantize import quantize_e4m3
from optmem.model.random import random_decoder, random_state
from optmem.train.corpus import open_corpus
from optmem.train.evaluate_pages import held_out, parse_form
from optmem.train.evaluate_reading import Nano, encode, read_greedily, read_samples

FORM = parse_form("512:8x16")
ROWS = range(2, 10)
KINDS = ("prose", "code", "shuffled", "characters", "symbols")  # natural, words in any order, and no words at all
V1 = public_config("deepseek-ocr")
CORPUS = Path.home() / ".cache" / "optmem" / "corpus"


def difference(actual, expected):
    """Relative rms, and the mean cosine of a row."""
    actual, expected = (torch.cat(list(tensors)).double() for tensors in (actual, expected))
    return {
        "rms": ((actual - expected).norm() / expected.norm()).item(),
        "cosine": cosine_similarity(actual, expected, dim=-1).mean().item(),
    }


def mixed(sees, says):
    """A model that sees with one and says with the other."""
    model = copy(says)
    model.encoder = sees.encoder
    return model


def agreement(said, base):
    """Symbols and rows that are those of the base, place by place."""
    symbols = same_symbols = rows = same_rows = 0
    for page, other in zip(base, said, strict=True):
        found = {row.number: row.ids for row in other.rows}
        for row in page.rows:
            ids = found.get(row.number, [])
            symbols, rows = symbols + len(row.ids), rows + 1
            same_symbols += sum(one == two for one, two in zip(row.ids, ids, strict=False))
            same_rows += row.ids == ids
    likeness = sum(page.score().likeness for page in said) / len(said)
    return {"symbols": symbols, "same_symbols": same_symbols, "rows": rows, "same_rows": same_rows, "likeness": likeness}


@torch.inference_mode()
def measure(models, corpus, kind, number):
    samples = held_out(corpus, kind, FORM, 0, number)
    seen = {name: encode(Nano.of(model), samples) for name, model in models.items() if name in ("fp32", "bf16", "fp8")}
    features = {"bf16": difference(seen["bf16"], seen["fp32"]), "fp8": difference(seen["fp8"], seen["bf16"])}
    said = {}
    for name, model in models.items():
        tokens = seen[{"fp8 encoder": "fp8", "fp8 decoder": "bf16"}.get(name, name)]
        said[name] = read_samples(Nano.of(model), samples, tokens, [ROWS] * number, read_greedily)
    return {"features": features, "reading": {name: agreement(found, said["bf16"]) for name, found in said.items()}}


@torch.inference_mode()
def measure_v1(corpus):
    """Features of the encoder at full size, over a page of 512 px; logits of 64 tokens of a decoder at half of its sizes."""
    image = torch.from_numpy(held_out(corpus, "prose", FORM, 0, 1)[0].image)[None, ..., None]
    seen = v1_ways(random_encoder, lambda encoder: [encoder(image)[0]])
    config = scaled(V1, 0.5).decoder
    ids = torch.randint(0, config.vocab_size, (64,), generator=torch.Generator().manual_seed(0))
    said = v1_ways(lambda dtype: random_decoder(config, 0, dtype), lambda decoder: [logits(decoder, ids)])
    return {"features": seen, "logits": said, "decoder_layers": config.layers, "hidden": config.hidden}


def v1_ways(make, run):
    """One module at a time: of the decoder alone there are gigabytes."""
    fp32, bf16 = (run(make(dtype)) for dtype in (torch.float32, torch.bfloat16))
    eight = make(torch.bfloat16)
    quantize_e4m3(eight)
    return {"bf16": difference(bf16, fp32), "fp8": difference(run(eight), bf16)}


def random_encoder(dtype):
    with torch.device("meta"):
        encoder = Encoder(V1)
    encoder.load_state_dict(random_state(encoder, 0, dtype), assign=True)
    return encoder.requires_grad_(requires_grad=False).eval()


def logits(decoder, ids):
    cache = Cache.for_tokens(decoder.config, len(ids), decoder.dtype, prompt=len(ids))
    batch = cache.batch([cache.new_sequence(prompt=len(ids))], [len(ids)])
    return decoder.logits(decoder(decoder.embed(ids), batch, cache))


def show(name, pair):
    figures = (f"{way} rms {one['rms']:.2%} cosine {one['cosine']:.6f}" for way, one in pair.items())
    print(f"{name:28}", *figures, sep="   ")


def main(number, parts):
    corpus, found = open_corpus(CORPUS, "held-out"), {}
    if "v1" in parts:
        found["v1"] = measure_v1(corpus)
        show("random V1, features", found["v1"]["features"])
        show("random V1, half, logits", found["v1"]["logits"])
    nano = find_checkpoint("nano")
    fp32, bf16, fp8 = (Model.load(nano, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.bfloat16))
    quantize_e4m3(fp8.encoder, fp8.decoder)
    models = {"bf16": bf16, "fp32": fp32, "fp8": fp8, "fp8 encoder": mixed(fp8, bf16), "fp8 decoder": mixed(bf16, fp8)}
    for kind in (kind for kind in KINDS if kind in parts):
        found[kind] = measure(models, corpus, kind, number)
        show(f"nano, {kind}", found[kind]["features"])
        for name, one in found[kind]["reading"].items():
            symbols = f"{one['same_symbols'] / one['symbols']:9.3%} of {one['symbols']} symbols"
            rows = f"{one['same_rows']} of {one['rows']} rows"
            print(f"    {name:12} {symbols}, {rows} as bf16; likeness to the page {one['likeness']:.4f}", flush=True)
    print(json.dumps({"torch": torch.__version__, "pages": number, "found": found}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, sys.argv[2:] or ("v1", *KINDS))
