"""Not a test: the histories that the memory's tests tell, and what holds for every context."""

import base64
import io
import random

from PIL import Image

from optmem.memory.context import FactsItem, NoteItem, PageItem, TextItem
from optmem.pages import paginate
from optmem.text.count import estimate_tokens

WORDS = ("alpha", "beta", "gamma", "delta", "run", "test", "file", "build", "error", "value", "count", "paper", "water", "light")


def said(seed, words=40):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def turn(number, words=40, extra=""):
    return [
        {"role": "user", "content": f"Turn {number}: {said(number, words)}\n{extra}"},
        {"role": "assistant", "content": said(-number)},
    ]


def key(number):
    return f"{random.Random(1000 + number).getrandbits(40):010x}"


def said_of(number):
    return f"the key of host {number} is {key(number)} in /srv/app/{number}.cfg"


def history(memory, turns, every=5):
    """Turns with a key each, and contexts in between, as an agent asks for them."""
    seqs = []
    for number in range(turns):
        seqs += memory.add(turn(number, extra=said_of(number)))
        if number % every == every - 1:
            memory.context()
    memory.context()
    return seqs


def check_context(view, memory, groups):
    """What holds for every context."""
    assert view.tokens == sum(item.tokens for item in view.items) <= view.budget
    firsts = []
    told = set()
    tiers = {tier.name: tier for tier in memory.optics.ladder.tiers}
    for item in view.items:
        if isinstance(item, TextItem):
            firsts.append(item.seq)
            assert item.seq not in told
            told.add(item.seq)
            assert item.tokens == estimate_tokens(item.message.text())
        elif isinstance(item, PageItem):
            firsts.append(item.messages[0])
            tier = tiers[item.tier]
            extra = 0 if tier.kind == "sheet" else estimate_tokens(item.facts)
            assert item.tokens == tier.tokens + extra
            with Image.open(io.BytesIO(item.png)) as picture:
                side = 512 if tier.kind == "sheet" else min(tier.side, 512)
                assert picture.size == (item.width, item.height) == (side, side)
        elif isinstance(item, NoteItem):
            assert item.tokens == estimate_tokens(item.text)
        else:
            assert isinstance(item, FactsItem)
            firsts.append(item.messages[0])
            assert item.tokens == estimate_tokens(item.text)
    notes = [at for at, item in enumerate(view.items) if isinstance(item, NoteItem)]
    assert len(notes) <= 1
    if not any(isinstance(item, PageItem) and len(item.pages) > 1 for item in view.items):
        assert firsts == sorted(firsts)
    for group in groups:
        assert not group & told or group <= told, "a group is text or it is not"
    for provider in ("openai", "anthropic", "gemini", "qwen"):
        view.messages(provider)
    return told


def png_of(text, side=512):
    file = io.BytesIO()
    Image.fromarray(paginate(text, size=side)[0].image()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def with_picture(data, kind="image_url"):
    url = {"url": f"data:image/png;base64,{data}"}
    return {"role": "user", "content": [{"type": "text", "text": "what I see"}, {"type": kind, "image_url": url}]}
