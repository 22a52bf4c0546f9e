"""Copies side by side on the CPU: the same bits as in turn with as many threads each, errors, modes, batch norms."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from test_replicas import Awkward, conv_net, cross_entropy, image_batch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hta_fused as hta
from hta_fused import side_by_side as module
from hta_fused.side_by_side import side_by_side


@pytest.fixture
def threads():
    """Sets torch's number of threads, for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(replicas: hta.Replicas) -> list[torch.Tensor]:
    return [replicas.grads.clone(), *(buffer.clone() for net in replicas for buffer in net.buffers())]


@pytest.mark.parametrize(("copies", "have"), [(2, 2), (3, 2), (5, 2), (2, 1), (2, 4), (2, 3)])
def test_bits_are_those_in_turn_with_as_many_threads_each(threads, copies, have):
    replicas = hta.Replicas(conv_net(), copies, start="independent")
    batches = [image_batch() for _ in range(copies)]
    saved = {name: value.clone() for name, value in replicas.state_dict().items()}
    left = copies % have

    def in_turn(net, batch):
        number = list(replicas).index(net)
        torch.set_num_threads(1 if number < copies - left else have // left)
        return cross_entropy(net, batch)

    threads(have)
    expected = replicas.backward(in_turn, *batches), results(replicas)
    threads(have)
    for _ in range(3):
        replicas.load_state_dict(saved)
        replicas.zero_grad()
        losses = replicas.backward(cross_entropy, *batches, concurrent=True)
        assert torch.get_num_threads() == have
        assert all(map(torch.equal, losses, expected[0]))
        assert all(map(torch.equal, results(replicas), expected[1]))


def test_calls_meet_and_threads_are_shared_out(threads):
    meeting = threading.Barrier(2)

    def call():
        meeting.wait(timeout=60)  # for two at once
        return torch.get_num_threads(), threading.current_thread()

    for have, each in ((4, 2), (2, 1), (5, 2)):
        threads(have)
        (first, one), (second, other) = side_by_side([call, call])
        assert first == second == each
        assert len({one, other, threading.current_thread()}) == 3
        assert torch.get_num_threads() == have
        with ThreadPoolExecutor(1) as new:
            assert new.submit(torch.get_num_threads).result() == have  # nobody else notices


def test_the_first_error_is_raised_when_all_have_ended(threads):
    threads(2)
    replicas = hta.Replicas(conv_net(), 4)
    ended, batch = [], image_batch()
    numbers = {id(net): number for number, net in enumerate(replicas)}

    def fn(net):
        loss = cross_entropy(net, batch)
        ended.append(number := numbers[id(net)])
        if number in (1, 2):
            raise ArithmeticError(f"in copy {number}")
        return loss

    with pytest.raises(ArithmeticError, match="in copy 1"):
        replicas.backward(fn, concurrent=True)
    assert sorted(ended) == [0, 1, 2, 3]
    with pytest.raises(TypeError, match="fn must return a loss"):
        replicas.backward(lambda net: None, concurrent=True)
    replicas.backward(lambda net: cross_entropy(net, batch), concurrent=True)  # the threads are still there


def test_grad_mode_and_autocast_are_the_callers(threads):
    threads(2)
    replicas = hta.Replicas(conv_net())
    batch = image_batch()
    seen = []

    def fn(net, batch):
        with torch.no_grad():
            seen.append(net(batch[0]).dtype)
        assert torch.is_grad_enabled()
        return cross_entropy(net, batch)

    with torch.autocast("cpu", torch.bfloat16):
        replicas.backward(fn, batch, concurrent=True)
    replicas.backward(fn, batch, concurrent=True)
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        replicas.backward(cross_entropy, batch, concurrent=True)
    with torch.no_grad():
        replicas.backward(torch.enable_grad()(cross_entropy), batch, concurrent=True)


MODES = {
    "a dispatch mode": lambda: FlopCounterMode(display=False),
    "a function mode": lambda: torch.device("cpu"),
    "hooks of saved tensors": torch.autograd.graph.save_on_cpu,
    "both": torch.autograd.graph.allow_mutation_on_saved_tensors,
}


@pytest.mark.parametrize("mode", MODES)
def test_under_a_threads_own_modes_copies_go_in_turn(threads, mode):
    threads(2)
    replicas = hta.Replicas(conv_net())
    batch = image_batch()
    found = []

    def fn(net):
        found.append(threading.current_thread())
        return cross_entropy(net, batch)

    def grads(concurrent):
        replicas.zero_grad()
        found.clear()
        replicas.backward(fn, concurrent=concurrent)
        return replicas.grads.clone()

    with MODES[mode]():
        expected = grads(False)
        assert torch.equal(grads(True), expected)
    assert found == [threading.current_thread()] * 2
    grads(True)
    assert threading.current_thread() not in found


def test_saved_tensor_hooks_and_flops_are_of_all_copies(threads):
    threads(2)
    replicas = hta.Replicas(conv_net())
    batch = image_batch()
    counts = []
    for concurrent in (False, True):
        saved = []
        with FlopCounterMode(display=False) as counter:
            replicas.backward(cross_entropy, batch, concurrent=concurrent)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):
            replicas.backward(cross_entropy, batch, concurrent=concurrent)
        counts.append((counter.get_total_flops(), len(saved)))
    assert counts[0] == counts[1] > (0, 0)


def test_tied_weights_under_autocast_have_the_same_bits_each_time(threads):
    threads(2)
    replicas = hta.Replicas(Awkward(), 2, {"scale": 1})
    x = torch.randint(0, 11, (50,))

    def fn(net):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = F.linear(F.linear(net.embed(x), net.head.weight), net.head.weight.t())
            return F.cross_entropy(F.linear(hidden, net.head.weight).float(), x)

    found = []
    for _ in range(20):
        replicas.zero_grad()
        replicas.backward(fn, concurrent=True)
        found.append(replicas.grads.clone())
    assert all(torch.equal(grads, found[0]) for grads in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_starts_its_own_threads(threads):
    threads(2)
    assert side_by_side([lambda: 1, lambda: 2]) == [1, 2]
    assert module._pools
    child = os.fork()
    if not child:
        os._exit(0 if not module._pools and side_by_side([lambda: 1, lambda: 2]) == [1, 2] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_one_copy_or_one_thread_stays_where_it_is(threads):
    threads(1)
    assert side_by_side([threading.current_thread] * 3) == [threading.current_thread()] * 3
    threads(2)
    assert side_by_side([threading.current_thread]) == [threading.current_thread()]
    assert side_by_side([]) == []
    replicas = hta.Replicas(nn.Linear(2, 2), 1)
    replicas.backward(lambda net: net(torch.ones(2)).sum(), concurrent=True)
    assert replicas.grads.any()
