"""Lines to shards on the same machine, without Ray."""

import socket
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from sparsemem.distributed import lines
from sparsemem.distributed.lines import Line, LostLine, Switchboard
from sparsemem.distributed.wire import received, sent

SECONDS = 10.0
VALUES = [
    None,
    [1, 2.5, "a", True],
    {"a": torch.arange(5), "b": (torch.ones(2, 3, dtype=torch.bfloat16), None)},
    torch.zeros(0, 4),
    torch.tensor(3.0, dtype=torch.float64),
    torch.randn(300_000),  # more than a socket holds
    torch.arange(12).view(3, 4).T,  # not contiguous
]


@pytest.fixture
def echo():
    """A shard that answers what it is asked, and fails where it is asked to."""

    def answer(call):
        value = received(call)
        if value == "fail":
            raise RuntimeError("as asked")
        if value == "wait":
            time.sleep(0.5)
        return sent(value)

    board = Switchboard(answer)
    yield board
    board.close()


def heard(line, value):
    call = line.ask(sent(value), SECONDS)
    line.hear(call, SECONDS)
    return None if call.answer is None else received(call.answer)


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(
            same(*pair) for pair in zip(one, other, strict=True)
        )
    return one == other


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_come_back_as_they_were(echo, value):
    line = Line(echo.address)
    assert same(heard(line, value), value)
    line.close()


def test_what_is_received_can_be_written_to(echo):
    line = Line(echo.address)
    answer = heard(line, torch.ones(3))
    answer += 1
    assert answer.tolist() == [2, 2, 2]
    line.close()


def test_calls_are_answered_in_their_order_and_failures_end_nothing(echo):
    line = Line(echo.address)
    calls = [line.ask(sent(value), SECONDS) for value in (1, "fail", 3)]
    line.hear(calls[2], SECONDS)
    assert all(call.is_done for call in calls)
    assert [call.answer and received(call.answer) for call in calls] == [1, None, 3]
    assert line.is_open
    line.close()


def test_several_clients_at_once(echo):
    found = []

    def client(number):
        line = Line(echo.address)
        found.extend(heard(line, torch.full((50,), number)).sum().item() for _ in range(20))
        line.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(50 * number for number in range(4) for _ in range(20))


def test_an_answer_that_does_not_come_closes_the_line(echo):
    line = Line(echo.address)
    slow, other = line.ask(sent("wait"), SECONDS), line.ask(sent(2), SECONDS)
    with pytest.raises(TimeoutError):
        line.hear(slow, 0.05)
    assert not line.is_open
    assert all(call.is_done and call.answer is None for call in (slow, other))


def test_a_call_for_which_there_is_no_room_fails(echo):
    line = Line(echo.address)
    line.ask(sent("wait"), SECONDS)
    call = line.ask(sent(torch.zeros(2_000_000)), 0.05)
    assert (call.is_done, call.answer, line.is_open) == (True, None, False)


def test_the_other_end_goes():
    board = Switchboard(lambda call: call)
    line = Line(board.address)
    assert heard(line, 1) == 1
    board.close()
    with pytest.raises(OSError, match="refused"):
        Line(board.address)
    assert heard(line, 1) == 1  # those that there are stay
    server, client = socket.socketpair()
    line._socket = client
    server.close()
    assert heard(line, 1) is None
    assert not line.is_open


@pytest.mark.parametrize("end", ["client", "shard"])
def test_another_users_process_is_refused(echo, monkeypatch, end):
    def is_own(_):
        is_client = threading.current_thread() is threading.main_thread()
        return is_client != (end == "client")

    monkeypatch.setattr(lines, "is_own", is_own)
    if end == "client":
        with pytest.raises(LostLine, match="another user"):
            Line(echo.address)
    else:
        line = Line(echo.address)
        assert heard(line, 1) is None
        assert not line.is_open


def test_who_is_at_the_other_end():
    one, other = socket.socketpair()
    assert lines.is_own(one)
    one.close()
    other.close()


@pytest.mark.parametrize("garbage", [b"x" * 20, lines.LENGTH.pack(4) + b"{}{}", b""])
def test_a_client_that_says_nonsense_is_let_go_of(echo, garbage):
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    end.connect(f"\0{echo.address}")
    end.sendall(garbage)
    end.shutdown(socket.SHUT_WR)
    end.settimeout(SECONDS)
    with suppress(ConnectionResetError):  # where it had not read all
        assert end.recv(1) == b""
    end.close()
    line = Line(echo.address)
    assert heard(line, np.pi) == np.pi
    line.close()
