"""Whatever answers are lost, each change is done once, and in the order that it was asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.distributed.asking import Asking
from sparsemem.distributed.errors import ShardError

DONE, ANSWER_LOST, CALL_LOST, INTERRUPTED, REFUSED = range(5)
SHARDS = 3


class Shards(Asking):
    """Shards that remember what they did, reached over a wire that loses things by plan."""

    def __init__(self, plan=()):
        super().__init__(SHARDS)
        self.plan = list(plan)
        self.done = [[] for _ in range(SHARDS)]
        self.known = [(0, None)] * SHARDS

    def _exchange(self, calls, outcomes):
        lost = None
        for shard, call in enumerate(calls):
            if call is None or shard in outcomes:
                continue
            fate = self.plan.pop(0) if self.plan else DONE
            if fate == INTERRUPTED:
                raise KeyboardInterrupt
            if fate != CALL_LOST:
                answer = self.answer(shard, call, fate)
            if fate in (CALL_LOST, ANSWER_LOST):
                lost = ShardError(f"shard {shard} has not answered")
            else:
                outcomes[shard] = answer
        if lost:
            raise lost

    def answer(self, shard, call, fate):
        if not call.sequence:
            return len(self.done[shard])
        last, answer = self.known[shard]
        assert call.sequence in (last, last + 1)
        if call.sequence == last + 1:
            answer = ValueError("refused") if fate == REFUSED else call.arguments[0].tolist()
            self.known[shard] = call.sequence, answer
            if fate != REFUSED:
                self.done[shard].append(call.arguments[0].tolist())
        return answer


def arguments(number, asked):
    return [(torch.tensor([number, shard]),) if asked[shard] else None for shard in range(SHARDS)]


ASKED = st.lists(st.booleans(), min_size=SHARDS, max_size=SHARDS)
FATES = st.sampled_from([DONE, DONE, ANSWER_LOST, CALL_LOST, INTERRUPTED])


@given(st.lists(st.tuples(ASKED, st.booleans()), max_size=8), st.lists(FATES, max_size=40))
def test_each_change_is_done_once_and_in_order(changes, plan):
    shards, expected = Shards(plan), [[] for _ in range(SHARDS)]
    for number, (asked, again) in enumerate(changes):
        given = arguments(number, asked)
        for shard in range(SHARDS):
            if asked[shard]:
                expected[shard].append([number, shard])
        while True:
            try:
                answers = shards.ask("step", given)
            except (ShardError, KeyboardInterrupt):
                # It begins once what was open before it has come to its end.
                calls = shards._open.calls if shards._open else []
                begun = any(call and call.arguments[0][0] == number for call in calls)
                if again or not begun:
                    continue
            else:
                assert answers == [[number, s] if asked[s] else None for s in range(SHARDS)]
            break
    shards.plan.clear()
    shards.settle()
    assert shards.done == expected


def test_looks_see_no_half_of_a_change():
    shards = Shards([DONE, CALL_LOST, DONE])
    with pytest.raises(ShardError, match="shard 1 has not answered"):
        shards.ask("step", arguments(1, [True] * 3))
    assert [len(done) for done in shards.done] == [1, 0, 1]
    assert shards.ask("stats_at", [()] * 3) == [1, 1, 1]


def test_what_goes_wrong_again_is_told_again():
    shards = Shards([CALL_LOST, DONE, DONE, CALL_LOST])
    for _ in range(2):
        with pytest.raises(ShardError, match="shard 0 has not answered"):
            shards.ask("stats_at" if _ else "step", arguments(1, [True] * 3))
    assert shards.ask("stats_at", [()] * 3) == [1, 1, 1]


def test_a_refusal_uses_a_number_and_ends_the_change():
    shards = Shards([REFUSED, DONE, DONE])
    with pytest.raises(ValueError, match="refused"):
        shards.ask("step", arguments(1, [True] * 3))
    assert shards.ask("step", arguments(2, [True] * 3)) == [[2, 0], [2, 1], [2, 2]]
    assert shards.done == [[[2, 0]], [[1, 1], [2, 1]], [[1, 2], [2, 2]]]


def test_a_call_that_cannot_be_sent_uses_no_number():
    shards = Shards()
    with pytest.raises(TypeError, match="cannot be sent"):
        shards.ask("step", [(object(),)] * 3)
    assert shards.ask("step", arguments(1, [True] * 3)) == [[1, 0], [1, 1], [1, 2]]


def test_the_same_again_later_is_another_change():
    shards = Shards()
    for _ in range(2):
        shards.ask("step", arguments(1, [True] * 3))
    assert shards.done[0] == [[1, 0], [1, 0]]
