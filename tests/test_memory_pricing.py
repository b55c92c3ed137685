"""Prices of pictures: as providers publish them and as they were billed, and the choice between a picture and text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optmem.errors import InputError
from optmem.memory.pricing import DEFAULTS, READERS, best_size, compare, find_reader, image_tokens


@pytest.mark.parametrize(
    ("reader", "width", "height", "tokens"),
    [
        # Anthropic's: 28 x 28 pixels a token
        ("claude", 1568, 728, 56 * 26),
        ("claude", 200, 200, 64),
        ("claude", 1000, 1000, 1296),
        ("claude", 2576, 1449, 4784),
        ("claude-standard", 1092, 1092, 1521),
        # as billed (image-token-cost), less the 65 or 77 tokens of the request's own text
        ("claude-standard", 256, 256, 165 - 65),
        ("claude-standard", 512, 512, 426 - 65),
        ("claude-standard", 768, 768, 849 - 65),
        ("claude-standard", 1024, 1024, 1434 - 65),
        ("claude-standard", 1280, 720, 1261 - 65),
        ("claude-standard", 1920, 1080, 1625 - 65),
        ("claude-standard", 1080, 1920, 1625 - 65),
        ("claude", 1024, 1024, 1446 - 77),
        ("claude", 1280, 720, 1273 - 77),
        ("claude", 1920, 1080, 2768 - 77),
        # OpenAI's worked examples
        ("gpt-4o", 1024, 1024, 765),
        ("gpt-4o", 2048, 4096, 1105),
        ("gpt-4o", 512, 512, 255),
        ("gpt-5", 512, 512, 210),
        ("o3", 512, 512, 225),
        ("gpt-5.4-mini", 1024, 1024, 1659),
        ("gpt-5.4-mini", 1800, 2400, 2353),  # 1,452 patches
        ("gpt-5-nano", 1024, 1024, 2520),
        # as billed: detail high and original
        ("gpt-5.4", 256, 256, 77),
        ("gpt-5.4", 512, 512, 308),
        ("gpt-5.4", 768, 768, 692),
        ("gpt-5.4", 1024, 1024, 1229),
        ("gpt-5.4", 1280, 720, 1104),
        ("gpt-5.4", 1920, 1080, 2448),
        ("gpt-5.4", 2560, 1440, 2931),
        ("gpt-5.4", 3840, 2160, 2931),
        ("gpt-5.4", 4032, 3024, 2942),
        ("gpt-5.4-original", 2560, 1440, 4320),
        ("gpt-5.4-original", 3840, 2160, 9792),
        ("gpt-5.4-original", 4032, 3024, 11868),
        # Google's
        ("gemini-2", 384, 384, 258),
        ("gemini-2", 960, 540, 6 * 258),
        ("gemini-3", 512, 512, 1120),
        ("gemini-3-low", 4000, 4000, 280),
        # Qwen's
        ("qwen2.5-vl", 1024, 1024, 37 * 37 + 2),
        ("qwen2.5-vl", 28, 28, 4 + 2),
        ("qwen2.5-vl", 8000, 8000, 128 * 128 + 2),
        ("qwen3-vl", 1024, 1024, 1024 + 2),
        ("qwen3-vl", 64, 64, 64 + 2),
    ],
)
def test_published_and_billed(reader, width, height, tokens):
    assert image_tokens(reader, width, height) == tokens


def test_what_was_billed_of_gemini_3_is_below_the_published_most():
    for billed in (1090, 1101, 1065):
        assert 0.94 * image_tokens("gemini", 1024, 1024) < billed <= image_tokens("gemini", 1024, 1024)


sides = st.integers(1, 20_000)


@pytest.mark.parametrize("name", READERS)
@given(width=sides, height=sides)
def test_what_is_sent_is_seen_whole(name, width, height):
    reader = READERS[name]
    across, down = best_size(reader, width, height)
    assert 1 <= across <= width
    assert 1 <= down <= height
    cost = image_tokens(reader, width, height)
    sent = image_tokens(reader, across, down)
    assert sent >= 1
    if name not in ("gemini-2",) and min(across, down) >= 64:
        assert sent <= cost * 1.03 + 64, "scaling costs nothing more than a row of the grid"
    formula = reader.formula
    if hasattr(formula, "most") and name.startswith(("claude", "gpt")):
        factor = getattr(formula, "factor", 1)
        assert cost <= formula.most * factor + 1


@pytest.mark.parametrize("name", ["claude", "claude-standard", "gpt-5.4", "gpt-4o", "qwen3-vl"])
def test_price_does_not_depend_on_how_it_lies(name):
    for width, height in ((512, 512), (1568, 728), (3000, 1000), (5000, 4999)):
        assert image_tokens(name, width, height) == image_tokens(name, height, width)


def test_the_choice_is_in_numbers():
    page = compare("anthropic", 512, 512, text="word " * 800)
    assert page.image_tokens == 361
    assert page.is_worth_it
    assert page.saved == page.text_tokens - 361
    assert (
        str(page)
        == f"claude: 361 as a picture of 512x512, about {page.text_tokens:,} as text: a picture saves {page.saved:,} tokens"
    )
    dear = compare("gemini", 512, 512, text_tokens=400)
    assert not dear.is_worth_it
    assert str(dear) == "gemini-3: up to 1,120 as a picture of 512x512, 400 as text: text saves 720 tokens"
    assert not compare("openai", 512, 512, text_tokens=308).is_worth_it


def test_readers():
    assert {find_reader(provider).provider for provider in DEFAULTS} == set(DEFAULTS)
    for wrong in ("gpt-9", "", None, 3):
        with pytest.raises(InputError, match="prices are known of"):
            find_reader(wrong)
    for size in ((0, 1), (1, -1), (1.5, 1), (True, 1), (10**6, 1)):
        with pytest.raises(InputError, match="sides of 1 to"):
            image_tokens("claude", *size)
