"""What an 8-bit cache costs nano in answers: held-out pages of every kind, read token by token with either cache.

    python bench/kv_error.py [pages of a kind]

Two numbers of every kind.  How far a symbol's log-probability moves, where both caches are given what the exact one said; and how
many symbols and rows are the same where each goes its own way.  One line of JSON last.
"""

import json
import sys
from functools import partial
from itertools import islice
from typing import get_args
from unittest.mock import patch

import torch

from optmem import Engine
from optmem.model.cache import Cache
from optmem.train import corpus as corpora
from optmem.train.evaluate_pages import held_out, mode_of, parse_form
from optmem.train.evaluate_reading import Nano, encode, read_greedily, read_samples, said_logits
from optmem.train.kinds import PageKind
from optmem.train.sources import SOURCES

ROWS = 8  # of a page


def eight_bits(function, module, *arguments):
    """The same call with caches of 8 bits."""
    with patch(f"optmem.{module}.Cache", partial(Cache, kv="8bit")):
        return function(*arguments)


@torch.inference_mode()
def measure(nano, corpus, kind, number):
    form = parse_form("512:8x16")
    samples = held_out(corpus, kind, form, 0, number)
    features, rows = encode(nano, samples), [range(2, 2 + ROWS)] * number
    exact = read_samples(nano, samples, features, rows, read_greedily)
    eight = eight_bits(read_samples, "engine.rows", nano, samples, features, rows, read_greedily)
    errors, symbols, same_symbols, same_rows, num_rows = [], 0, 0, 0, 0
    for page, other, tokens in zip(exact, eight, features, strict=True):
        said = [row for row in page.rows if row.ids]
        given = (nano.model.decoder, nano.prefix(tokens, mode_of(form)), said, nano.tokenizer)
        ids = torch.tensor([token for row in said for token in row.ids], dtype=torch.int64)
        both = said_logits(*given), eight_bits(said_logits, "train.evaluate_reading", *given)
        first, second = (logits.log_softmax(-1).gather(1, ids[:, None])[:, 0] for logits in both)
        errors.append((first - second).abs())
        others = {row.number: row.ids for row in other.rows}
        for row in page.rows:
            found = others.get(row.number, [])
            symbols, num_rows = symbols + len(row.ids), num_rows + 1
            same_symbols += sum(one == two for one, two in zip(row.ids, found, strict=False))
            same_rows += row.ids == found
    error = torch.cat(errors)
    figures = {"symbols": symbols, "same_symbols": same_symbols, "rows": num_rows, "same_rows": same_rows}
    return figures | {"mean": error.mean().item(), "p99": error.quantile(0.99).item(), "most": error.max().item()}


def main(number):
    engine = Engine.from_pretrained("nano", device="cpu")
    python = [source for source in SOURCES if source.name == "python"]
    corpus = corpora.make_corpus([document for source in python for document in islice(source.documents(), 40)])
    found = {}
    print(
        f"{'kind':12}{'symbols':>9}{'same':>9}{'rows':>6}{'same':>6}{'mean':>10}{'p99':>10}{'most':>10}   |log-probability error|"
    )
    for kind in get_args(PageKind):
        one = found[kind] = measure(Nano.of(engine.model), corpus, kind, number)
        counts = f"{one['symbols']:9}{one['same_symbols']:9}{one['rows']:6}{one['same_rows']:6}"
        print(f"{kind:12}{counts}{one['mean']:10.2e}{one['p99']:10.2e}{one['most']:10.2e}", flush=True)
    print(json.dumps({"dtype": str(engine.model.decoder.dtype), "torch": torch.__version__, "kinds": found}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
