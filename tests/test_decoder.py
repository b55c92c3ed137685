"""The decoder against transformers' Unlimited-OCR text model, and the promises that the engine will build on."""

from dataclasses import replace

import pytest
import torch

from optmem.errors import InputError
from optmem.model.cache import GONE, Cache
from optmem.model.config import DecoderConfig, ModelConfig
from optmem.model.decoder import Decoder, greedy
from optmem.model.layout import packed_tensors
from optmem.model.random import random_decoder, random_state
from optmem.testing import assert_equal, generator

SMALL = DecoderConfig(vocab_size=301, hidden=96, layers=4, heads=3, dense_width=200, experts=16, expert_width=40, top_k=4)
DTYPES = [torch.float32, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("one_thread")


def prompt_of(length, config=SMALL, dtype=torch.float32):
    return torch.randn(length, config.hidden, generator=generator(f"prompt {length}")).to(dtype)


class Oracle:
    """transformers' model with the same weights.  V1 is UL with a window longer than the text."""

    def __init__(self, decoder, window=4096):
        pytest.importorskip("transformers")
        from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrTextConfig
        from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrTextModel

        config = decoder.config
        theirs = UnlimitedOcrTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden,
            intermediate_size=config.dense_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            n_routed_experts=config.experts,
            n_shared_experts=config.shared_experts,
            num_experts_per_tok=config.top_k,
            moe_intermediate_size=config.expert_width,
            first_k_dense_replace=config.dense_layers,
            sliding_window=window,
        )
        self.decoder = decoder
        with torch.device("meta"):
            self.model = UnlimitedOcrTextModel(theirs).eval()
        self.model.load_state_dict(dict(map(self.renamed, decoder.model.state_dict().items())), assign=True)
        self.model.rotary_emb = type(self.model.rotary_emb)(theirs)  # its buffers are not in a checkpoint

    @staticmethod
    def renamed(item):
        name, value = item
        return (f"{name}_proj" if name.endswith((".experts.gate_up", ".experts.down")) else name), value

    @torch.no_grad()
    def hidden(self, embeddings):
        return self.model(inputs_embeds=embeddings[None]).last_hidden_state[0]

    @torch.no_grad()
    def greedy(self, embeddings, max_tokens):
        tokens, cache, hidden = [], None, embeddings[None]
        for _ in range(max_tokens):
            output = self.model(inputs_embeds=hidden, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.last_hidden_state[0, -1:] @ self.decoder.lm_head.weight.T
            tokens.append(int(logits.float().argmax()))
            hidden = self.decoder.embed(torch.tensor(tokens[-1:]))[None]
        return tokens


def hidden_of(decoder, embeddings, chunks=None):
    """All hidden states of one prompt, in chunks of these sizes."""
    cache = Cache.for_tokens(decoder.config, len(embeddings), decoder.dtype)
    sequence = cache.new_sequence(prompt=len(embeddings))
    parts = embeddings.split(chunks or len(embeddings))
    return torch.cat([decoder(part, cache.batch([sequence], [len(part)]), cache) for part in parts])


def assert_near(decoder, oracle, embeddings, tolerance):
    """Logits, relative to the largest."""
    ours = decoder.logits(hidden_of(decoder, embeddings))
    theirs = (oracle.hidden(embeddings) @ decoder.lm_head.weight.T).float()
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"relative error {error:.3g}"


def test_names_are_those_of_a_checkpoint():
    theirs = {name: shape for name, shape in packed_tensors(ModelConfig("deepseek-ocr")).items() if name in ours()}
    assert theirs == ours()
    text = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert {name for name in packed_tensors(ModelConfig("deepseek-ocr")) if name.startswith("model.layers.")} | text == set(ours())


def ours():
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Decoder(DecoderConfig()).named_parameters()}


def test_the_full_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(DecoderConfig()).parameters()) == 2_934_734_080


@pytest.mark.parametrize("length", [1, 2, 17, 60])
def test_logits_are_the_references(length):
    decoder = random_decoder(SMALL, 1)
    assert_near(decoder, Oracle(decoder), prompt_of(length), 2e-5)


def test_logits_at_full_width():
    """One dense layer and one of experts with the true sizes, a small vocabulary."""
    config = replace(DecoderConfig(), vocab_size=500, layers=2)
    decoder = random_decoder(config, 2)
    assert_near(decoder, Oracle(decoder), prompt_of(40, config), 2e-5)


def test_bf16_is_as_far_from_fp32_as_the_references_is():
    decoder = random_decoder(SMALL, 3, torch.bfloat16)
    wide = random_decoder(SMALL, 3).float()
    wide.load_state_dict({name: value.float() for name, value in decoder.state_dict().items()})
    embeddings = prompt_of(50, dtype=torch.bfloat16)
    exact = hidden_of(wide, embeddings.float())
    # Of every token, then the median: where two experts are nearly tied, rounding chooses, and one token is far off in either.
    error, theirs = (
        (states.float() - exact).square().mean(1).sqrt().median()
        for states in (hidden_of(decoder, embeddings), Oracle(decoder).hidden(embeddings))
    )
    assert error < 1.1 * theirs


@pytest.mark.parametrize("seed", [4, 5])
def test_greedy_tokens_are_the_references(seed):
    decoder = random_decoder(SMALL, seed)
    tokens = list(greedy(decoder, prompt_of(33), 64))
    assert tokens == Oracle(decoder).greedy(prompt_of(33), 64)
    assert len(set(tokens)) > 8, "a text of few tokens proves little"


def check_window(window, length, max_tokens):
    shallow = replace(SMALL, layers=2)
    decoder = random_decoder(replace(shallow, window=window), 6)
    tokens = list(greedy(decoder, prompt_of(length), max_tokens))
    assert tokens == Oracle(decoder, window).greedy(prompt_of(length), max_tokens)
    full = Decoder(shallow)
    full.load_state_dict(decoder.state_dict(), assign=True)
    unlimited = list(greedy(full, prompt_of(length), 4 * window))
    assert unlimited[:window] == tokens[:window], "the first tokens see everything"
    assert unlimited != tokens[: 4 * window], "the window changes nothing here"


@pytest.mark.parametrize("length", [5, 40])
def test_reference_sliding_window(length):
    check_window(16, length, 400 if length == 40 else 100)


@pytest.mark.slow
def test_reference_sliding_window_at_its_true_width():
    check_window(128, 273, 400)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_window_holds_few_pages_and_changes_no_token(dtype):
    """Tokens and states, bit for bit, of a cache that gives pages back and of one that keeps them all; alone and as a fork."""
    config = replace(SMALL, layers=2, window=16)
    decoder, prompt = random_decoder(config, 12, dtype), prompt_of(50, dtype=dtype)
    kept, given = Cache(replace(config, window=None), 64, dtype=dtype), Cache(config, 10, dtype=dtype)
    texts = []
    for cache in (kept, given):
        first = cache.new_sequence(prompt=50)
        hidden = decoder(prompt, cache.batch([first], [50]), cache)[-1:].expand(2, -1)
        sequences, tokens, states, held = [first, first.fork()], [], [], []
        for step in range(300):
            ids = decoder.logits(hidden).argmax(-1)
            if step == 0:
                ids[1] += 1  # the two part here
            tokens.append(ids.tolist())
            hidden = decoder(decoder.embed(ids), cache.batch(sequences, [1, 1]), cache)
            states.append(hidden)
            held.append(max(sum(page != GONE for page in sequence.pages) for sequence in sequences))
            cache.check_integrity(sequences)
        texts.append((tokens, torch.cat(states), max(held), len(cache.users) - len(cache.free)))
    (tokens, states, most, _), (same_tokens, same_states, least, used) = texts
    assert same_tokens == tokens
    assert_equal(same_states, states)
    assert (most, least) == (22, 4 + 1 + 1)
    assert used <= 3 + 2 * 3, "the pages of the prompt are still shared"
    assert list(greedy(decoder, prompt, 300)) == [first for first, _ in tokens]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("chunks", [1, 7, 16, 32])
def test_a_prompt_in_chunks_is_the_prompt(dtype, window, chunks):
    """Bit for bit; the window leaves the prompt alone although the first chunk does not hold all of it."""
    decoder = random_decoder(replace(SMALL, window=window), 7, dtype)
    embeddings = prompt_of(50, dtype=dtype)
    assert_equal(hidden_of(decoder, embeddings, chunks), hidden_of(decoder, embeddings))
    assert list(greedy(decoder, embeddings, 20, chunk=chunks)) == list(greedy(decoder, embeddings, 20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_mates_do_not_matter(dtype):
    """Prompts, one token and drafts in one pass: every sequence as if it were alone, bit for bit."""
    decoder = random_decoder(replace(SMALL, window=8), 8, dtype)
    lengths, counts = [40, 3, 21, 1, 18], [40, 1, 4, 1, 18]
    cache = Cache(decoder.config, 20, dtype=dtype)
    sequences = [cache.new_sequence(prompt=min(length, 10)) for length in lengths]
    texts = [prompt_of(length, dtype=dtype) for length in lengths]
    for sequence, text, count in zip(sequences, texts, counts, strict=True):
        if len(text) > count:
            decoder(text[:-count], cache.batch([sequence], [len(text) - count]), cache)
    news = [text[-count:] for text, count in zip(texts, counts, strict=True)]
    together = decoder(torch.cat(news), cache.batch(sequences, counts), cache).split(counts)
    for sequence, text, states, count in zip(sequences, texts, together, counts, strict=True):
        own = Cache.for_tokens(decoder.config, len(text), dtype)
        alone = own.new_sequence(prompt=sequence.prompt)
        assert_equal(decoder(text, own.batch([alone], [len(text)]), own)[-count:], states)
    cache.check_integrity(sequences)


@pytest.mark.parametrize("length", [20, 32])
def test_a_forked_prefix_is_as_good_as_its_own(length):
    """Three texts behind one page of vision tokens, computed once."""
    decoder = random_decoder(SMALL, 9)
    prefix, tails = prompt_of(length), [prompt_of(n) for n in (1, 9, 14)]
    cache = Cache(SMALL, 12)
    shared = cache.new_sequence(prompt=length)
    decoder(prefix, cache.batch([shared], [length]), cache)
    forks = [shared.fork(prompt=length + len(tail)) for tail in tails]
    counts = [len(tail) for tail in tails]
    together = decoder(torch.cat(tails), cache.batch(forks, counts), cache).split(counts)
    for tail, states in zip(tails, together, strict=True):
        assert_equal(states, hidden_of(decoder, torch.cat([prefix, tail]))[length:])
    cache.check_integrity([shared, *forks])


def test_refused_drafts_leave_no_trace():
    decoder = random_decoder(SMALL, 10)
    text, drafts = prompt_of(30), prompt_of(31)
    cache = Cache.for_tokens(SMALL, 40, torch.float32)
    sequence = cache.new_sequence(prompt=12)
    for length in (0, 12, 15):
        decoder(drafts[:9], cache.batch([sequence], [9]), cache)
        sequence.truncate(length)
        end = {0: 12, 12: 15, 15: 30}[length]
        states = decoder(text[length:end], cache.batch([sequence], [end - length]), cache)
    assert_equal(states, hidden_of(decoder, text)[15:])


def test_greedy_stops():
    decoder = random_decoder(SMALL, 4)
    tokens = list(greedy(decoder, prompt_of(33), 20))
    end = tokens[5]
    assert list(greedy(decoder, prompt_of(33), 20, end)) == tokens[: tokens.index(end) + 1]
    assert list(greedy(decoder, prompt_of(33), 0)) == []


@pytest.mark.parametrize(
    ("length", "arguments", "words"),
    [
        (0, {"max_tokens": 5}, r"\[T, 96\] with at least one token, got \[0, 96\]"),
        (33, {"max_tokens": -1}, "max_tokens must be 0 or more, got -1"),
        (33, {"max_tokens": 5, "chunk": -1}, "chunk must be at least 1, or None for the whole prompt at once, got -1"),
        (33, {"max_tokens": 5, "chunk": 0}, "chunk must be at least 1"),
        (33, {"max_tokens": 8}, "at most 40 together, got 33 and 8"),
        (41, {"max_tokens": 0}, "at most 40 together, got 41 and 0"),
    ],
)
def test_greedy_refuses(length, arguments, words):
    """When it is called, not at the first token."""
    decoder = random_decoder(replace(SMALL, layers=2, max_positions=40), 4)
    with pytest.raises(InputError, match=words):
        greedy(decoder, prompt_of(length), **arguments)
    assert len(list(greedy(decoder, prompt_of(33), 7))) == 7


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([3, 301]), "must be 0 to 300, got 301 at 1"),
        (torch.tensor([-1, 301]), "must be 0 to 300, got -1 at 0"),
        (torch.tensor([1.0]), r"must be torch.int64 \[T\], got torch.float32 \[1\]"),
        (torch.tensor([[1]]), r"must be torch.int64 \[T\], got torch.int64 \[1, 1\]"),
    ],
)
def test_refuses_other_ids(ids, words):
    decoder = random_decoder(replace(SMALL, layers=2), 4)
    assert decoder.embed(torch.tensor([0, 300])).shape == (2, 96)
    assert decoder.embed(ids.flatten()[:0].long()).shape == (0, 96)
    with pytest.raises(InputError, match=words):
        decoder.embed(ids)


def test_refuses_other_embeddings():
    decoder = random_decoder(SMALL, 4)
    cache = Cache(SMALL, 4)
    batch = cache.batch([cache.new_sequence(prompt=5)], [5])
    for wrong in (prompt_of(4), prompt_of(5).double(), prompt_of(5)[None]):
        with pytest.raises(InputError, match=r"embeddings must be torch.float32 \[5, 96\]"):
            decoder(wrong, batch, cache)


def test_random_weights_use_their_experts_evenly():
    config = replace(DecoderConfig(), vocab_size=16, layers=2)
    decoder = random_decoder(config, 11, torch.bfloat16)
    x = prompt_of(400, config, torch.bfloat16)
    counts = decoder.model.layers[1].mlp.gate(x).starts.diff()
    assert counts.min() > 0.2 * counts.float().mean()
    assert counts.max() < 2.5 * counts.float().mean()
    states = hidden_of(decoder, x[:50]).float()
    assert 0.5 < states.std() < 2.0
    assert_equal(random_state(decoder, 11)["lm_head.weight"], random_state(decoder, 11)["lm_head.weight"])
