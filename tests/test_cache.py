"""The paged cache: who holds which page, whatever is appended, cut, forked and closed."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from optmem.errors import InputError
from optmem.model.cache import GONE, Cache
from optmem.model.config import DecoderConfig
from optmem.testing import assert_equal

CONFIG = DecoderConfig(vocab_size=8, hidden=4, layers=1, heads=1, dense_width=4, experts=2, expert_width=4, top_k=1)


WINDOW = replace(CONFIG, window=20)


def write(cache, sequences, texts):
    """Puts numbers where the decoder would put keys."""
    batch = cache.batch(sequences, [len(text) for text in texts])
    numbers = torch.tensor([number for text in texts for number in text], dtype=torch.float32)
    cache.keys[0].flatten(0, 1)[batch.slots] = numbers[:, None, None].expand(-1, 1, 4)


def read(cache, sequence):
    """The numbers of a sequence, None where their page was given back."""
    pages = [[None] * cache.page_size if page == GONE else cache.keys[0][page, :, 0, 0].int().tolist() for page in sequence.pages]
    return [number for page in pages for number in page][: sequence.length]


def state(cache, sequences):
    return cache.users[:], cache.free[:], [(sequence.prompt, sequence.length, sequence.pages[:]) for sequence in sequences]


def assert_reads(cache, sequence, text):
    """All that the next token sees is there, and whatever is there is what was written."""
    numbers = read(cache, sequence)
    seen = range(len(text) if cache.window is None else sequence.prompt)
    recent = range(max(0, len(text) - (cache.window or 0) + 1), len(text))
    assert len(numbers) == len(text)
    assert all(number in (None, written) for number, written in zip(numbers, text, strict=True))
    assert None not in [numbers[at] for at in (*seen, *recent) if at < len(text)]


@pytest.mark.parametrize("config", [CONFIG, WINDOW, replace(CONFIG, window=1)], ids=["full", "window 20", "window 1"])
@pytest.mark.parametrize("seed", [5, 6])
def test_random_lives(config, seed):
    """Every sequence reads what it wrote, or what it was forked from, no page is lost, and what is refused changes nothing."""
    rng = random.Random(seed)
    cache = Cache(config, 30)
    sequences, texts, refused = [], [], Counter()
    for step in range(600):
        action = rng.choice(["new", "append", "append", "append", "undo", "truncate", "fork", "close"])
        at = rng.randrange(len(sequences)) if sequences else 0
        before = state(cache, sequences)
        try:
            if action == "new" or not sequences:
                sequences.append(cache.new_sequence(prompt=rng.choice([0, 3, 40])))
                texts.append([])
            elif action in ("append", "undo"):
                several = rng.sample(range(len(sequences)), rng.randint(1, min(3, len(sequences))))
                news = [[step * 100 + i for i in range(rng.randint(1, 40))] for _ in several]
                write(cache, [sequences[i] for i in several], news)
                for i, new in zip(several, news, strict=True):
                    if action == "undo":
                        sequences[i].truncate(len(texts[i]))
                    else:
                        texts[i] = texts[i] + new
            elif action == "truncate":
                length = rng.randint(0, len(texts[at]))
                sequences[at].truncate(length)
                texts[at] = texts[at][:length]
            elif action == "fork":
                sequences.append(sequences[at].fork(rng.choice([None, 0, 25, 60])))
                texts.append(texts[at])
            else:
                sequences.pop(at).close()
                texts.pop(at)
        except InputError:
            refused[action] += 1
            assert state(cache, sequences) == before
        cache.check_integrity(sequences)
        for sequence, text in zip(sequences, texts, strict=True):
            assert_reads(cache, sequence, text)
    assert set(refused) <= ({"append", "undo"} if config is CONFIG else {"append", "undo", "truncate", "fork"})
    assert refused["append"], "memory never ran out"


@pytest.mark.parametrize(("prompt", "window"), [(50, 16), (48, 17), (0, 1), (1, 128), (33, 31)])
def test_a_window_bounds_the_pages(prompt, window):
    """Those of the prompt, those of the window and one more, which is all that for_tokens makes; the rest is free again."""
    config = replace(CONFIG, window=window)
    cache = Cache.for_tokens(config, prompt + 400, torch.float32, prompt=prompt)
    bound = -(-prompt // 16) + -(-window // 16) + 1
    assert len(cache.users) == bound
    sequence, text = cache.new_sequence(prompt), list(range(prompt))
    if prompt:
        write(cache, [sequence], [text])
    for step in range(400):
        write(cache, [sequence], [[1000 + step]])
        text.append(1000 + step)
        assert_reads(cache, sequence, text)
        cache.check_integrity([sequence])
    assert sequence.pages.count(GONE) == len(sequence.pages) - bound + len(cache.free)
    sequence.close()
    cache.check_integrity([sequence])
    assert len(cache.free) == bound


def test_a_shared_page_is_free_when_all_have_passed_it():
    """A fork's prompt keeps what lies behind the other's, and two that pass a page in one batch make its room."""
    cache = Cache(WINDOW, 5)
    first = cache.new_sequence(prompt=10)
    write(cache, [first], [range(64)])
    second, third = first.fork(), first.fork(prompt=40)
    write(cache, [first], [range(1)])
    assert first.pages == [0, GONE, 2, 3, 4]
    assert cache.users == [3, 2, 3, 3, 1]
    with pytest.raises(InputError, match="1 pages of 16 tokens are needed, 0 of 5 are free"):
        write(cache, [second], [range(1)])
    third.close()
    write(cache, [second], [range(1)])
    assert (first.pages, second.pages) == ([0, GONE, 2, 3, 4], [0, GONE, 2, 3, 1])
    cache.check_integrity([first, second])
    write(cache, [first, second], [range(15)] * 2)
    before = state(cache, [first, second])
    with pytest.raises(InputError, match="4 pages of 16 tokens are needed, 1 of 5 are free"):
        write(cache, [first, second], [range(20)] * 2)
    assert state(cache, [first, second]) == before


def test_what_was_given_back_cannot_be_seen_again():
    cache = Cache(WINDOW, 9)
    sequence = cache.new_sequence(prompt=10)
    write(cache, [sequence], [range(80)])
    write(cache, [sequence], [range(3)])
    assert sequence.gone() == range(1, 3)
    before = state(cache, [sequence])
    for length in (17, 66):
        with pytest.raises(InputError, match=f"83 tokens cannot be cut to {length}: it can to 16 or fewer, or 67 or more"):
            sequence.truncate(length)
    with pytest.raises(InputError, match="a fork's prompt can have 16 tokens, for those behind were given back, got 17"):
        sequence.fork(prompt=17)
    assert state(cache, [sequence]) == before
    fork = sequence.fork(prompt=16)
    sequence.truncate(67)
    fork.truncate(16)
    cache.check_integrity([sequence, fork])


def test_a_fork_needs_no_memory_until_it_writes():
    cache = Cache(CONFIG, 4)
    first = cache.new_sequence(prompt=20)
    write(cache, [first], [range(20)])
    second = first.fork(prompt=25)
    assert (second.pages, second.prompt, first.prompt) == (first.pages, 25, 20)
    write(cache, [second], [[7]])
    assert second.pages[0] == first.pages[0]
    assert second.pages[1] != first.pages[1]
    write(cache, [first], [[8]])
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
        (lambda sequence: sequence.cache.batch([sequence, sequence], [3, 2]), "a sequence once, but of its 2 only 1 differ"),
        (lambda sequence: sequence.cache.batch([sequence, sequence.fork()], [3, -2]), "at least one token of a sequence, got -2"),
        (lambda sequence: Cache(CONFIG, 4).batch([sequence], [3]), "of its own cache, but number 0 is of another"),
        (lambda sequence: sequence.fork(prompt=-3), "0 tokens or more, got -3"),
        (lambda sequence: sequence.cache.new_sequence(-5), "0 tokens or more, got -5"),
    ],
)
def test_refuses(call, words):
    cache = Cache(CONFIG, 4)
    sequence = cache.new_sequence(prompt=1)
    with pytest.raises(InputError, match=words):
        call(sequence)
    cache.check_integrity([sequence])


def test_a_batch_without_room_changes_nothing():
    """Not the copy of a shared page either, which the first sequence could have had."""
    cache = Cache(CONFIG, 5)
    first = cache.new_sequence(prompt=1)
    write(cache, [first], [range(20)])
    sequences = [first, first.fork(), cache.new_sequence(prompt=1)]
    before = state(cache, sequences)
    for counts, needed in (([1, 1, 33], 4), ([20, 1, 20], 4), ([1, 20, 50], 6)):
        with pytest.raises(InputError, match=f"{needed} pages of 16 tokens are needed, 3 of 5 are free"):
            cache.batch(sequences, counts)
        assert state(cache, sequences) == before
    cache.batch(sequences, [12, 1, 32])
    assert [sequence.pages for sequence in sequences] == [[0, 2], [0, 1], [3, 4]]
    cache.check_integrity(sequences)


@pytest.fixture
def forked():
    """Two sequences with the pages 0 and 1; 2 and 3 are free."""
    first = Cache(CONFIG, 4).new_sequence(prompt=1)
    first.append(20)
    both = [first, first.fork()]
    first.cache.check_integrity(both)
    return both


@pytest.mark.parametrize(
    ("pages", "words"),
    [
        ([0, 0], "a page twice"),
        ([0, 9], "does not exist"),
        ([0, -2], "does not exist"),
        ([0, GONE], "a page that is seen was given back"),
        ([0, 2], "miscounted"),
        ([0], "not the pages it needs"),
    ],
)
def test_check_integrity_finds_wrong_pages(forked, pages, words):
    forked[1].pages = pages
    with pytest.raises(AssertionError, match=words):
        forked[0].cache.check_integrity(forked)


@pytest.mark.parametrize("free", [[3, 2, 3], [3], [3, 2, 1], [3, 9]])
def test_check_integrity_finds_wrong_free_pages(forked, free):
    forked[0].cache.free = free
    with pytest.raises(AssertionError, match="a free page is used, or lost"):
        forked[0].cache.check_integrity(forked)


def test_check_integrity_finds_wrong_sequences(forked):
    first, second = forked
    for sequences, words in (
        ([first], "miscounted"),
        ([first, second, first], "named twice"),
        ([first, second, Cache(CONFIG, 4).new_sequence(1)], "of another cache"),
    ):
        with pytest.raises(AssertionError, match=words):
            first.cache.check_integrity(sequences)


def test_a_windowed_row_stays_what_it_is_between_pages():
    """So that its table is kept: only where a page is taken or given back is there another array."""
    cache = Cache(WINDOW, 12)
    sequence = cache.new_sequence(prompt=5)
    write(cache, [sequence], [list(range(5))])
    rows = [sequence.row()]
    for number in range(64):
        write(cache, [sequence], [[number]])
        rows.append(sequence.row())
    assert len({id(row) for row in rows}) <= 2 * (64 // 16) + 1
    cache.check_integrity([sequence])
