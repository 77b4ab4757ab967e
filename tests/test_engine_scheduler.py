"""Fair admission, chunked prompts, and the blocks of the KV arena."""

from __future__ import annotations

import random

import pytest
from tiny_models import tiny_tokenizer

from serve.engine.base import GenerationRequest, SamplingParams
from serve.engine.blocks import SMALLEST, Block, BlockPool, block_size
from serve.engine.scheduler import Admission, Scheduler
from serve.engine.sequence import Stream

TOKENIZER = tiny_tokenizer()


def stream(name: str, account: str = "", length: int = 5) -> Stream:
    request = GenerationRequest(name, (9,) * length, SamplingParams(), account=account)
    return Stream(request, lambda delta: None, TOKENIZER, frozenset())


def names(scheduler: Scheduler) -> list[str]:
    return [s.request.id for s in scheduler.running]


def run_all(_: Stream) -> Admission:
    return Admission.RUN


def test_accounts_take_turns() -> None:
    scheduler = Scheduler(max_batch=6, prefill_chunk=64)
    for n in range(10):
        scheduler.add(stream(f"a{n}", "a"))
    scheduler.add(stream("b0", "b"))
    scheduler.add(stream("c0", "c"))
    scheduler.add(stream("c1", "c"))
    scheduler.admit(run_all)
    assert names(scheduler) == ["a0", "b0", "c0", "a1", "c1", "a2"]


def test_nobody_overtakes_one_that_does_not_fit() -> None:
    scheduler = Scheduler(max_batch=8, prefill_chunk=64)
    scheduler.add(stream("big", "a", length=100))
    scheduler.add(stream("small", "b"))
    scheduler.admit(lambda s: Admission.FULL if s.max_length > 50 else Admission.RUN)
    assert names(scheduler) == []
    scheduler.admit(run_all)
    assert names(scheduler) == ["big", "small"]


def test_one_that_waits_for_its_adapter_lets_others_pass() -> None:
    scheduler = Scheduler(max_batch=8, prefill_chunk=64)
    scheduler.add(stream("cold", "a"))
    scheduler.add(stream("warm", "a"))
    scheduler.admit(lambda s: Admission.PARK if s.request.id == "cold" else Admission.RUN)
    assert names(scheduler) == ["warm"]


def test_finished_ones_are_forgotten_wherever_they_are() -> None:
    scheduler = Scheduler(max_batch=1, prefill_chunk=64)
    streams = [stream(str(n)) for n in range(3)]
    for one in streams:
        scheduler.add(one)
    scheduler.admit(run_all)
    streams[0].finish_reason = streams[2].finish_reason = "cancelled"
    assert set(map(id, scheduler.remove_finished())) == {id(streams[0]), id(streams[2])}
    scheduler.admit(run_all)
    assert names(scheduler) == ["1"]


def test_prompts_share_the_step_with_streams() -> None:
    scheduler = Scheduler(max_batch=4, prefill_chunk=8)
    streams = [stream("decoding", length=3), stream("long", length=20), stream("next", length=6)]
    for one in streams:
        scheduler.add(one)
    scheduler.admit(run_all)
    streams[0].num_computed = 3
    streams[1].num_computed = 15
    works = [(w.stream.request.id, w.start, w.num_tokens) for w in scheduler.plan()]
    assert works == [("decoding", 3, 1), ("long", 15, 5), ("next", 0, 3)]


def test_a_long_prompt_goes_slower_beside_streams() -> None:
    scheduler = Scheduler(max_batch=4, prefill_chunk=100, prefill_beside=12)
    streams = [stream("long", length=60), stream("decoding", length=3)]
    for one in streams:
        scheduler.add(one)
    scheduler.admit(run_all)
    assert [w.num_tokens for w in scheduler.plan()] == [60, 3]  # nobody is stalled
    streams[1].num_computed = 3
    assert [w.num_tokens for w in scheduler.plan()] == [1, 3]  # a quarter
    streams[0].num_computed = 50  # what lies far back costs, too
    assert [w.num_tokens for w in scheduler.plan()] == [1, 2]


def test_blocks_never_overlap_and_come_back_whole() -> None:
    draw = random.Random(0)
    pool = BlockPool(64 * 45 + 17)
    held: list[Block] = []
    for _ in range(3000):
        if held and draw.random() < 0.5:
            pool.release(held.pop(draw.randrange(len(held))))
            continue
        block = pool.allocate(draw.randint(1, 700))
        if block is not None:
            assert block.offset % block.size == 0
            assert block.offset + block.size <= pool.num_tokens
            apart = (
                b.offset + b.size <= block.offset or block.offset + block.size <= b.offset
                for b in held
            )
            assert all(apart)
            held.append(block)
        assert pool.num_used == sum(b.size for b in held)
    for block in held:
        pool.release(block)
    whole = pool.allocate(pool.largest)
    assert whole == Block(0, pool.largest)


def test_short_blocks_lie_densely_at_the_low_end() -> None:
    pool = BlockPool(64 * 45)
    lanes = [block.lane for block in (pool.allocate(100) for _ in range(8)) if block]
    assert lanes == list(range(8))


@pytest.mark.parametrize(("tokens", "size"), [(1, SMALLEST), (64, 64), (65, 128), (1000, 1024)])
def test_block_sizes(tokens: int, size: int) -> None:
    assert block_size(tokens) == size


def test_no_room_is_none() -> None:
    pool = BlockPool(128)
    assert pool.allocate(129) is None
    assert pool.allocate(128) is not None
    assert pool.allocate(1) is None
    assert BlockPool(SMALLEST - 1).allocate(1) is None
