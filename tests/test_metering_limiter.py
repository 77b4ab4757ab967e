"""The limiter against a naive recomputation on a simulated clock, and under threads."""

from __future__ import annotations

import random
import threading
from fractions import Fraction

import pytest

from data.errors import RateLimited
from serve.limiter import DAY_S, MINUTE_S, Limiter, Rate, duration


class Clock:
    """A clock that the test turns."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


def requests(amount: int, period_s: float = MINUTE_S) -> Rate:
    return Rate("proj", "m", "requests", amount, period_s)


def tokens(amount: int) -> Rate:
    return Rate("proj", "m", "tokens", amount, MINUTE_S)


@pytest.mark.parametrize("seed", range(5))
def test_admits_exactly_what_exact_arithmetic_admits(seed: int) -> None:
    dice, clock = random.Random(seed), Clock()
    limiter = Limiter(clock)
    rates = [requests(6), tokens(600), requests(300, DAY_S)]
    levels = [Fraction(rate.amount) for rate in rates]
    running = []
    admitted = refused = 0
    for _ in range(2000):
        ticks = dice.choice([0, 0, 1, 2, 10, 64])  # eighths of a second: exact as floats
        clock.s += ticks / 8
        for i, rate in enumerate(rates):
            grown = Fraction(ticks, 8) * rate.amount / int(rate.period_s)
            levels[i] = min(Fraction(rate.amount), levels[i] + grown)
        if running and dice.random() < 0.5:
            reservation, taken = running.pop(dice.randrange(len(running)))
            used = dice.randint(0, taken)
            reservation.settle(used)
            levels[1] = min(Fraction(600), levels[1] + taken - used)
        wanted = dice.randint(1, 400)
        fits = levels[0] >= 1 and levels[1] >= wanted and levels[2] >= 1
        try:
            running.append((limiter.take(rates, 1, wanted), wanted))
            assert fits
            admitted += 1
            levels = [levels[0] - 1, levels[1] - wanted, levels[2] - 1]
        except RateLimited as error:
            waits = error.retry_after_s
            refused += not fits and waits is not None and waits >= 1
        headers = limiter.headers(rates)
        assert int(headers["x-ratelimit-remaining-tokens"]) == int(levels[1])
    assert admitted + refused == 2000
    assert min(admitted, refused) > 50


def test_waiting_as_told_is_enough_and_a_second_less_is_not() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    rates = [requests(7), tokens(100)]
    for _ in range(7):
        limiter.take(rates, 1, 1)
    with pytest.raises(RateLimited) as caught:
        limiter.take(rates, 1, 1)
    assert caught.value.kind == "requests"
    assert caught.value.retry_after_s == 9  # 60 / 7 = 8.57
    clock.s += 8
    with pytest.raises(RateLimited):
        limiter.take(rates, 1, 1)
    clock.s += 1
    limiter.take(rates, 1, 1)


def test_nothing_is_taken_when_one_bucket_refuses() -> None:
    limiter = Limiter(Clock())
    rates = [requests(5), tokens(10)]
    limiter.take(rates, 1, 8)
    for _ in range(10):
        with pytest.raises(RateLimited) as caught:
            limiter.take(rates, 1, 8)
        assert caught.value.kind == "tokens"
    assert limiter.headers(rates)["x-ratelimit-remaining-requests"] == "4"


def test_a_prompt_beyond_the_limit_never_passes_and_long_answers_leave_a_debt() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    with pytest.raises(RateLimited) as caught:
        limiter.take([tokens(10)], 11, 20)
    assert caught.value.retry_after_s is None
    limiter.take([tokens(10)], 5, 100).settle(25)  # 10 were taken
    clock.s += 60 * 1.5  # 15 tokens later there is nothing, and no debt
    assert limiter.headers([tokens(10)])["x-ratelimit-remaining-tokens"] == "0"
    clock.s += 6
    limiter.take([tokens(10)], 1, 1)


def test_a_changed_limit_counts_at_once() -> None:
    limiter = Limiter(Clock())
    for _ in range(5):
        limiter.take([requests(5)], 1, 1)
    with pytest.raises(RateLimited):
        limiter.take([requests(5)], 1, 1)
    for _ in range(3):
        limiter.take([requests(8)], 1, 1)
    with pytest.raises(RateLimited):
        limiter.take([requests(8)], 1, 1)
    with pytest.raises(RateLimited) as caught:
        limiter.take([requests(0)], 1, 1)
    assert caught.value.retry_after_s is None


def test_threads_never_get_more_than_there_is() -> None:
    limiter = Limiter(Clock())
    rates = [requests(300), tokens(2000)]
    taken: list[int] = []

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(200):
            wanted = dice.randint(1, 20)
            try:
                reservation = limiter.take(rates, 1, wanted)
            except RateLimited:
                continue
            used = dice.randint(1, wanted)
            reservation.settle(used)
            taken.append(used)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    headers = limiter.headers(rates)
    assert sum(taken) == 2000 - int(headers["x-ratelimit-remaining-tokens"])
    assert len(taken) == 300 - int(headers["x-ratelimit-remaining-requests"])


def test_durations_read_as_clients_expect() -> None:
    shown = {0: "0ms", 0.12: "120ms", 1: "1s", 360: "6m0s", 3600: "1h0m0s", 8.57: "9s"}
    assert {s: duration(s) for s in shown} == shown
