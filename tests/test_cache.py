"""The paged cache: who holds which page, whatever is appended, cut, forked and closed."""

import random

import pytest
import torch

from optmem.errors import InputError
from optmem.model.cache import Cache
from optmem.model.config import DecoderConfig
from optmem.testing import assert_equal

CONFIG = DecoderConfig(vocab_size=8, hidden=4, layers=1, heads=1, dense_width=4, experts=2, expert_width=4, top_k=1)


def write(cache, sequence, tokens):
    """Puts numbers where the decoder would put keys."""
    batch = cache.batch([sequence], [len(tokens)])
    cache.keys[0].flatten(0, 1)[batch.slots] = torch.tensor(tokens, dtype=torch.float32)[:, None, None].expand(-1, 1, 4)


def read(cache, sequence):
    return cache.keys[0][sequence.pages, :, 0, 0].flatten()[: sequence.length].int().tolist()


def test_random_lives():
    """Every sequence reads what it wrote, or what it was forked from, and no page is lost."""
    rng = random.Random(5)
    cache = Cache(CONFIG, 30)
    sequences, texts = [], []
    for step in range(600):
        action = rng.choice(["new", "append", "append", "truncate", "fork", "close"])
        at = rng.randrange(len(sequences)) if sequences else 0
        try:
            if action == "new" or not sequences:
                sequences.append(cache.new_sequence(prompt=3))
                texts.append([])
            elif action == "append":
                text = [step * 100 + i for i in range(rng.randint(1, 40))]
                write(cache, sequences[at], text)
                texts[at] = texts[at] + text
            elif action == "truncate":
                length = rng.randint(0, len(texts[at]))
                sequences[at].truncate(length)
                texts[at] = texts[at][:length]
            elif action == "fork":
                sequences.append(sequences[at].fork())
                texts.append(texts[at])
            else:
                sequences.pop(at).close()
                texts.pop(at)
        except InputError:
            assert action in ("append", "new")  # no page is free: nothing has changed
        cache.check_integrity(sequences)
        assert [read(cache, sequence) for sequence in sequences] == texts


def test_a_fork_needs_no_memory_until_it_writes():
    cache = Cache(CONFIG, 4)
    first = cache.new_sequence(prompt=20)
    write(cache, first, range(20))
    second = first.fork(prompt=25)
    assert (second.pages, second.prompt, first.prompt) == (first.pages, 25, 20)
    write(cache, second, [7])
    assert second.pages[0] == first.pages[0]
    assert second.pages[1] != first.pages[1]
    write(cache, first, [8])
    assert first.pages == [0, 1]


def test_a_batch_says_where_everything_is():
    cache = Cache(CONFIG, 5)
    first, second = cache.new_sequence(prompt=18), cache.new_sequence(prompt=2)
    cache.batch([first], [15])
    batch = cache.batch([first, second], [3, 2])
    assert batch.positions.tolist() == [15, 16, 17, 0, 1]
    assert batch.slots.tolist() == [15, 16, 17, 32, 33]
    assert batch.starts.tolist() == [0, 3, 5]
    assert batch.last.tolist() == [2, 4]
    assert (batch.lengths.tolist(), batch.prompts.tolist()) == ([18, 2], [18, 2])
    assert_equal(batch.table, torch.tensor([[0, 1], [2, -1]], dtype=torch.int32))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda sequence: Cache(CONFIG, 4, page_size=sequence.length + 8), "multiple of 16 tokens"),
        (lambda sequence: sequence.append(0), "at least one token"),
        (lambda sequence: sequence.append(65), "5 pages of 16 tokens are needed, 4 of 4 are free"),
        (lambda sequence: sequence.truncate(1), "0 tokens cannot be cut to 1"),
        (lambda sequence: sequence.cache.batch([sequence], []), "a count for each"),
    ],
)
def test_refuses(call, words):
    cache = Cache(CONFIG, 4)
    sequence = cache.new_sequence(prompt=1)
    with pytest.raises(InputError, match=words):
        call(sequence)
    cache.check_integrity([sequence])


def test_a_batch_without_room_changes_nothing():
    cache = Cache(CONFIG, 4)
    sequences = [cache.new_sequence(prompt=1) for _ in range(2)]
    with pytest.raises(InputError, match="2 of 4 are free"):
        cache.batch(sequences, [20, 50])
    assert [sequence.length for sequence in sequences] == [0, 0]
    cache.check_integrity(sequences)
