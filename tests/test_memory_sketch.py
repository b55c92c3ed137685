"""What fills no page yet: which of it stays text, which is drawn, and when it is drawn for good.  Groups are plain numbers here."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optmem.memory.drawing import cut
from optmem.memory.policy import Policy
from optmem.memory.sketch import drawn_part, not_yet, open_groups

ROWS, TOKENS = 32, 73
NONE = Policy(keep=0)


def group(rows=8, tokens=80, **other):
    plain = {"reason": None, "attachments": [], "is_rest": False, "is_pinned": False}
    return SimpleNamespace(rows=rows, tokens=tokens, **plain | other)


def cost(groups, drawn):
    return math.ceil(sum(each.rows for each in groups[:drawn]) / ROWS) * TOKENS + sum(each.tokens for each in groups[drawn:])


groups_of = st.lists(st.builds(group, st.integers(1, 40), st.integers(1, 400)), max_size=12)


@given(groups_of, st.integers(0, 12), st.integers(0, 2000))
def test_a_split_costs_least_where_nothing_is_kept(groups, least, limit):
    least = min(least, len(groups))
    split = drawn_part(groups, least, ROWS, TOKENS, NONE, limit, 0)
    assert least <= split <= len(groups)
    costs = {at: cost(groups, at) for at in range(least, len(groups) + 1)}
    assert costs[split] == min(costs.values())
    assert split == min(at for at, found in costs.items() if found == costs[split]), "of equals the one with most text"


@given(groups_of, st.integers(0, 4000), st.none() | st.integers(0, 6))
def test_the_newest_stay_text_as_far_as_the_policy_says(groups, limit, keep):
    policy = Policy(keep=keep)
    split = drawn_part(groups, 0, ROWS, TOKENS, policy, limit, 0)
    tokens = [sum(each.tokens for each in groups[at:]) for at in range(len(groups) + 1)]
    fitting = [at for at, found in enumerate(tokens) if found <= policy.kept_tokens(limit) and len(groups) - at <= (keep or 99)]
    if keep != 0:
        assert split <= min(fitting)
    if keep and groups and groups[-1].tokens <= limit:
        assert split < len(groups), "the newest, where any was asked for"


def test_room_goes_to_the_newest_text():
    groups = [group() for _ in range(8)]  # two pages, or 640 tokens
    assert drawn_part(groups, 0, ROWS, TOKENS, NONE, 0, 0) == 8
    assert drawn_part(groups, 0, ROWS, TOKENS, NONE, 1000, 2 * TOKENS + 80) == 7
    assert drawn_part(groups, 0, ROWS, TOKENS, NONE, 1000, 2 * TOKENS + 8 * 80) == 0
    assert drawn_part(groups, 5, ROWS, TOKENS, NONE, 1000, 2 * TOKENS + 8 * 80) == 5, "what is drawn stays drawn"


@pytest.mark.parametrize(
    "what", [{"reason": "excluded"}, {"is_rest": True}, {"is_pinned": True}, {"attachments": ["photo"]}], ids=str
)
def test_a_sketch_begins_behind_what_is_no_part_of_it(what):
    groups = [group(), group(**what), group(), group()]
    assert open_groups(groups) == groups[2:]
    assert open_groups(groups[:2]) == []


def test_what_is_pinned_is_a_run_of_its_own():
    groups = [group(), group(is_pinned=True), group()]
    assert list(cut(groups, ROWS)) == [groups[:1], groups[1:2], groups[2:]]


@given(groups_of, st.integers(0, 9000), st.none() | st.integers(0, 6))
def test_runs_wait_until_enough_is_said_behind_them(groups, limit, keep):
    policy = Policy(keep=keep)
    runs = list(cut(groups, ROWS))
    count = not_yet(runs, policy, limit)
    assert 1 <= count <= len(runs)
    behind = [each for run in runs[len(runs) - count + 1 :] for each in run]
    if count > 1:  # without the oldest that waits there would be too little
        assert sum(each.tokens for each in behind) < policy.kept_tokens(limit)
        assert keep is None or len(behind) < keep
    waiting = [each for run in runs[len(runs) - count :] for each in run]
    if count < len(runs):
        assert sum(each.tokens for each in waiting) >= policy.kept_tokens(limit) or len(waiting) >= (keep or math.inf) or keep == 0
    assert not_yet(runs, NONE, limit) == 1
