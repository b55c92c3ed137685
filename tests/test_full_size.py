"""The public model at its full size, from disk, on this machine: run by hand with -m slow (minutes, 7 GB of disk and of memory)."""

import json
import subprocess
import sys

import pytest
import torch

from optmem.model.model import Model

PROGRAM = """
import json, sys, time
from pathlib import Path
import torch
from optmem import paginate
from optmem.model.decoder import greedy
from optmem.model.model import Model
from optmem.pixels import MODES, make_views

def peak_gib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20

start = time.perf_counter()
model = Model.load(sys.argv[1])
loaded, load_peak = time.perf_counter() - start, peak_gib()
weights = sum(weight.nbytes for weight in model.weights().values()) / 2**30
mode = MODES["base"]
views = make_views(paginate("A page of the history. " * 400, size=1024)[0].image(), mode)
start = time.perf_counter()
features = model.encode([views])
encoded = time.perf_counter() - start
ids = [0] + [model.config.image_id] * mode.fed_tokens() + [5, 6, 7]
start = time.perf_counter()
tokens = list(greedy(model.decoder, model.embed_prompt(ids, features, mode, [views.grid]), 64))
decoded = time.perf_counter() - start
print(json.dumps(dict(weights_gib=weights, load_s=loaded, load_peak_gib=load_peak, encode_s=encoded, decode_64_s=decoded,
                      peak_gib=peak_gib(), tokens=len(tokens), finite=bool(features[0].isfinite().all()))))
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_full_model_loads_and_reads_a_page_within_24_gib(tmp_path):
    Model.random("deepseek-ocr", dtype=torch.bfloat16).save(tmp_path / "v1")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path / "v1")], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    print({name: round(value, 2) for name, value in facts.items()})
    assert facts["finite"]
    assert facts["tokens"] == 64
    assert facts["load_peak_gib"] < 1.15 * facts["weights_gib"] + 0.6  # python and torch themselves
    assert facts["peak_gib"] < 12
