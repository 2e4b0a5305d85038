"""Whatever answers are lost, each change is done once, and in the order that it was asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.bank.errors import BankError
from sparsemem.distributed.asking import Asking
from sparsemem.distributed.errors import OutOfTurnError, ShardError

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


class Flight:
    """Calls on their way: what has come of each so far."""

    def __init__(self, network, calls):
        self.network = network
        self.found = {shard: None for shard, call in enumerate(calls) if call is not None}
        for shard in self.found:
            network.queues[shard].append((self, calls[shard]))

    def is_done(self):
        return None not in self.found.values()

    def collect(self, outcomes):
        for shard in self.found:
            self.network.deliver(shard, until=self)
        for shard, found in self.found.items():
            if not isinstance(found, BankError | ShardError):
                outcomes[shard] = found
        for found in self.found.values():
            if isinstance(found, BankError | ShardError):
                raise found


class Network(Asking):
    """Shards that do what arrives, in the order of its coming; begun calls take their time."""

    def __init__(self):
        super().__init__(SHARDS)
        self.done = [[] for _ in range(SHARDS)]
        self.answers = [{} for _ in range(SHARDS)]
        self.queues = [[] for _ in range(SHARDS)]

    def deliver(self, shard, until=None):
        """The next call arrives (or all, up to one's own)."""
        while self.queues[shard] and (until is None or until.found[shard] is None):
            flight, call = self.queues[shard].pop(0)
            flight.found[shard] = self.perform(shard, call)
            if until is None:
                break

    def lose(self, shard, first_is_done):
        """A shard dies, and with it all that is on its way to it."""
        if first_is_done and self.queues[shard]:
            self.perform(shard, self.queues[shard][0][1])
        for flight, _ in self.queues[shard]:
            flight.found[shard] = ShardError(f"shard {shard} has died")
        self.queues[shard].clear()

    def perform(self, shard, call):
        if not call.sequence:
            return len(self.done[shard])
        if call.sequence == len(self.answers[shard]) + 1:
            number, is_refused = call.arguments
            refused = ValueError(f"{number} is refused")
            self.answers[shard][call.sequence] = refused if is_refused else number
            self.done[shard].append(number)
        if call.sequence not in self.answers[shard]:
            return OutOfTurnError(f"{call.sequence} after {len(self.answers[shard])}")
        return self.answers[shard][call.sequence]

    def _exchange(self, calls, outcomes):
        for shard, call in enumerate(calls):
            if call is not None and shard not in outcomes:
                while self.queues[shard]:
                    self.deliver(shard)
                outcomes[shard] = self.perform(shard, call)
                assert not isinstance(outcomes[shard], OutOfTurnError)

    def _start(self, calls):
        return Flight(self, calls)


SHARD = st.integers(0, SHARDS - 1)
EVENTS = st.one_of(
    st.tuples(st.just("begin"), st.lists(st.booleans(), min_size=3, max_size=3), st.booleans()),
    st.tuples(st.just("deliver"), SHARD, st.none()),
    st.tuples(st.just("lose"), SHARD, st.booleans()),
    st.tuples(st.just("settle"), st.integers(0, 3), st.none()),
    st.tuples(st.just("look"), st.none(), st.none()),
    st.tuples(st.just("change"), st.none(), st.none()),
)


@given(events=st.lists(EVENTS, max_size=30))
def test_begun_changes_are_done_once_in_order_whatever_is_lost(events):
    network, expected, refused, told = Network(), [[] for _ in range(SHARDS)], [], []

    def settle(leave):
        while True:
            try:
                network.settle(leave)
            except ValueError as error:
                told.append(str(error))
            except ShardError:
                continue  # its next turn makes it good
            else:
                break
        assert network.under_way <= leave

    for number, (event, what, more) in enumerate(events):
        if event == "begin":
            given_to = [(number, more) if asked else None for asked in what]
            network.begin("step", given_to)
            for shard in range(SHARDS):
                expected[shard] += [number] if what[shard] else []
            refused += [f"{number} is refused"] if more and any(what) else []
        elif event == "deliver":
            network.deliver(what)
        elif event == "lose":
            network.lose(what, more)
        elif event == "settle":
            settle(what)
        elif event == "look":
            assert network.ask("stats_at", [()] * SHARDS) == [len(done) for done in network.done]
        else:
            settle(0)
            assert network.ask("step", [(number, False)] * SHARDS) == [number] * SHARDS
            expected = [[*done, number] for done in expected]
            assert network.done == expected
    settle(0)
    assert network.done == expected
    assert told == refused


def test_changes_that_cannot_be_brought_to_their_end_are_forgotten():
    shards = Shards([CALL_LOST] * 9)
    with pytest.raises(ShardError):
        shards.ask("step", arguments(1, [True] * 3))
    shards.drop()
    shards.plan.clear()
    assert shards.ask("stats_at", [()] * 3) == [0, 0, 0]
