"""Prompts and the repetition guard: exact ids, no forged pictures, every edge of the rule."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optmem.errors import CheckpointError, InputError
from optmem.testing.checkpoints import SPECIAL_PIECES, special_ids, tokenizer_json
from optmem.text import prompts
from optmem.text.detokenize import decode
from optmem.text.ngram import NgramGuard
from optmem.text.prompts import (
    IMAGE_MARK,
    TABLE_CELLS,
    TASKS,
    Mark,
    default_guard,
    locate_prompt,
    prompt_ids,
    task_prompt,
    text_prompt,
)
from optmem.text.tokenizer import GROUNDING, IMAGE, REF, REF_END, BytePairTokenizer

CONTENT = tokenizer_json()
TOKENIZER = BytePairTokenizer(CONTENT)
IDS = special_ids(CONTENT)
FAMILIES = ["deepseek-ocr", "unlimited-ocr", "deepseek-ocr-2"]


def ids_of(prompt, lengths):
    return prompt_ids(TOKENIZER, prompt, lengths, bos_id=0, image_id=IDS[IMAGE])


def spelled(prompt):
    return "".join(part.name if isinstance(part, Mark) else part for part in prompt)


@pytest.mark.parametrize(
    ("family", "task", "text"),
    [
        ("deepseek-ocr", "document", "<image>\n<|grounding|>Convert the document to markdown."),
        ("deepseek-ocr", "text", "<image>\nFree OCR."),
        ("deepseek-ocr", "ocr", "<image>\n<|grounding|>OCR this image."),
        ("deepseek-ocr", "figure", "<image>\nParse the figure."),
        ("deepseek-ocr", "describe", "<image>\nDescribe this image in detail."),
        ("deepseek-ocr-2", "document", "<image>\n<|grounding|>Convert the document to markdown."),
        ("deepseek-ocr-2", "text", "<image>\nFree OCR."),
        ("unlimited-ocr", "document", "<image>document parsing."),
        ("unlimited-ocr", "pages", "<image>Multi page parsing."),
    ],
)
def test_the_prompts_of_the_families(family, task, text):
    prompt = task_prompt(family, task)
    assert spelled(prompt) == text
    assert decode(TOKENIZER, ids_of(prompt, [3])[1:]) == text.replace(IMAGE, IMAGE * 3)


@pytest.mark.parametrize(("family", "task"), [("deepseek-ocr-2", "figure"), ("unlimited-ocr", "text"), ("llama", "text")])
def test_tasks_that_a_family_was_not_trained_on(family, task):
    with pytest.raises(InputError, match=r"document|deepseek-ocr"):
        task_prompt(family, task)


def test_the_layout_of_a_prompt():
    grounding, image = IDS[GROUNDING], IDS[IMAGE]
    words = TOKENIZER.encode("Convert the document to markdown.")
    assert ids_of(task_prompt("deepseek-ocr", "document"), [4]) == [0, *[image] * 4, *TOKENIZER.encode("\n"), grounding, *words]
    assert ids_of(("two: ", IMAGE_MARK, " and ", IMAGE_MARK, "?"), [1, 2]) == [
        0, *TOKENIZER.encode("two: "), image, *TOKENIZER.encode(" and "), image, image, *TOKENIZER.encode("?"),
    ]  # fmt: skip


def test_outer_blanks_are_stripped_and_inner_ones_kept():
    assert ids_of((" \n a", IMAGE_MARK, " b \n"), [1]) == ids_of(("a", IMAGE_MARK, " b"), [1])
    assert ids_of((" ",), []) == ids_of((), []) == [0]


def test_neighbouring_texts_are_one_text():
    assert ids_of(("th", "e quick"), []) == [0, *TOKENIZER.encode("the quick")]


def test_locate_puts_a_text_between_the_marks():
    ids = ids_of(locate_prompt(f"fox{REF_END}{IMAGE}"), [1])
    assert [ids.count(IDS[name]) for name in (REF, REF_END, IMAGE)] == [1, 1, 1]
    assert decode(TOKENIZER, ids).endswith(f"Locate {REF}fox{REF_END}{IMAGE}{REF_END} in the image.")


@pytest.mark.parametrize("name", SPECIAL_PIECES)
def test_a_users_words_hold_no_marks(name):
    ids = ids_of(text_prompt(f"{name} read {name}{name}", num_images=2), [5, 6])
    assert sum(token in TOKENIZER.special_ids for token in ids) == 1 + 11, "the start and the vision tokens, nothing else"
    assert ids.count(IDS[IMAGE]) == 11


@pytest.mark.parametrize("lengths", [[], [1, 2], [0], [-1], [1 << 30]])
def test_lengths_that_do_not_fit(lengths):
    with pytest.raises(InputError):
        ids_of(text_prompt("read"), lengths)


@pytest.mark.parametrize("lengths", [[3], [2, 1]])
def test_a_prompt_too_long_is_refused_whatever_it_is_made_of(lengths, monkeypatch):
    prompt = text_prompt("the quick brown fox", num_images=len(lengths))
    total = len(ids_of(prompt, lengths))
    monkeypatch.setattr(prompts, "MAX_TOKENS", total)
    assert len(ids_of(prompt, lengths)) == total
    monkeypatch.setattr(prompts, "MAX_TOKENS", total - 1)
    with pytest.raises(InputError, match=f"the prompt has {total} tokens, 3 of them vision tokens"):
        ids_of(prompt, lengths)
    with pytest.raises(InputError, match="0 of them"):
        ids_of(("one two " * 100,), [])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_users_words_stand_where_the_familys_own_do(family):
    assert spelled(text_prompt(" Read it. ", family=family)) == f"{IMAGE}{'' if family == 'unlimited-ocr' else chr(10)}Read it."
    own = spelled(task_prompt(family, "document"))
    assert own.startswith(f"{IMAGE}\n") == spelled(text_prompt("Read.", family=family)).startswith(f"{IMAGE}\n")


def test_words_for_a_family_without_prompts():
    with pytest.raises(InputError, match="llama"):
        text_prompt("read", family="llama")


def test_a_mark_that_the_tokenizer_does_not_know():
    with pytest.raises(CheckpointError, match="row_3"):
        ids_of((IMAGE_MARK, Mark("<row_3>")), [1])


# --- the repetition guard -----------------------------------------------------------------------------------------------------


def test_the_guards_of_the_families():
    cells = frozenset({128821, 128822})
    assert default_guard("deepseek-ocr") == NgramGuard(30, 90, cells)
    assert default_guard("deepseek-ocr-2", "text") == NgramGuard(20, 90, cells)
    assert default_guard("unlimited-ocr", "document") == NgramGuard(35, 128)
    assert default_guard("unlimited-ocr", "pages") == NgramGuard(35, 1024)
    assert default_guard("nano") is None
    assert cells == TABLE_CELLS
    assert all(default_guard(family, task) for family in FAMILIES for task in TASKS[family])


def test_the_guard_spares_the_cells_of_the_tokenizer():
    cells = frozenset({IDS["<td>"], IDS["</td>"]})
    assert default_guard("deepseek-ocr", tokenizer=TOKENIZER) == NgramGuard(30, 90, cells)
    assert default_guard("deepseek-ocr-2", "text", tokenizer=TOKENIZER) == NgramGuard(20, 90, cells)
    assert default_guard("unlimited-ocr", "pages", tokenizer=TOKENIZER) == NgramGuard(35, 1024), "it spares none"
    assert default_guard("nano", tokenizer=TOKENIZER) is None
    without = json.loads(CONTENT)
    without["added_tokens"] = [token for token in without["added_tokens"] if token["content"] != "<td>"]
    guard = default_guard("deepseek-ocr", tokenizer=BytePairTokenizer(json.dumps(without).encode()))
    assert guard == NgramGuard(30, 90, frozenset({IDS["</td>"]}))


@pytest.mark.parametrize(
    ("guard", "history", "banned"),
    [
        (NgramGuard(3, 90), [], set()),
        (NgramGuard(3, 90), [1, 2], set()),  # shorter than one sequence
        (NgramGuard(3, 90), [1, 2, 3], set()),
        (NgramGuard(3, 90), [1, 2, 3, 1, 2], {3}),
        (NgramGuard(3, 90), [1, 2, 3, 1, 2, 4, 1, 2], {3, 4}),
        (NgramGuard(3, 5), [1, 2, 3, 1, 2], {3}),  # the window holds just this much
        (NgramGuard(3, 4), [1, 2, 3, 1, 2], set()),  # and here the sequence lies partly outside
        (NgramGuard(3, 5), [9, 9, 2, 3, 1, 2, 3], {1}),  # the window from its own first token
        (NgramGuard(3, 3), [7, 7, 7, 7], {7}),
        (NgramGuard(3, 2), [7, 7, 7, 7], set()),  # a window below the size bans nothing
        (NgramGuard(3, 90), [7, 7], set()),
        (NgramGuard(3, 90), [7, 7, 7], {7}),  # a constant run: the last start is counted too
        (NgramGuard(2, 90), [7, 8, 7], {8}),
        (NgramGuard(2, 90), [7, 7], {7}),
        (NgramGuard(1, 3), [1, 2, 3, 4], {2, 3, 4}),  # size 1: the whole window
        (NgramGuard(1, 1), [1, 2], {2}),
        (NgramGuard(1, 1), [], set()),
        (NgramGuard(3, 90, frozenset({3})), [1, 2, 3, 1, 2, 4, 1, 2], {4}),  # the whitelist saves what would be banned
        (NgramGuard(3, 90, frozenset({1, 2})), [1, 2, 3, 1, 2], {3}),  # not what merely stands before it
        (NgramGuard(3, 90, frozenset({7})), [7, 7, 7], set()),
    ],
)
def test_the_guard_bans(guard, history, banned):
    assert guard.banned(history) == banned
    assert guard.banned(tuple(history)) == banned


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6), st.integers(1, 45), st.frozensets(st.integers(0, 3)))
def test_the_guard_is_its_definition(history, size, window, whitelist):
    starts = range(max(0, len(history) - window), len(history) - size + 1) if len(history) >= size else ()
    prefix = history[len(history) - size + 1 :]
    banned = {history[start + size - 1] for start in starts if history[start : start + size - 1] == prefix}
    assert NgramGuard(size, window, whitelist).banned(history) == banned - whitelist


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 5))
def test_under_the_guard_no_sequence_comes_twice(wishes, size):
    guard, history = NgramGuard(size, 1000), []
    for wish in wishes:
        if wish not in guard.banned(history):
            history.append(wish)
    sequences = [tuple(history[start : start + size]) for start in range(len(history) - size + 1)]
    assert len(sequences) == len(set(sequences))


@pytest.mark.parametrize(
    "arguments", [(0, 90), (-1, 90), (3, 0), (3, -5), (3.0, 90), (True, 90), (3, 90, frozenset({-1})), (3, 90, frozenset({"a"}))]
)
def test_guards_that_make_no_sense(arguments):
    with pytest.raises(InputError, match="ngram guard"):
        NgramGuard(*arguments)
