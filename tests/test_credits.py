"""How the engine's room is shared among front ends, over random histories."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fi_runtime.engine.credits import Credits


@given(
    st.integers(1, 40),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["use", "end", "grant"])), max_size=300),
)
def test_the_engine_is_never_overfull_and_never_idle_for_want_of_credit(
    limit: int, count: int, history: list[tuple[int, str]]
) -> None:
    credits = Credits(limit)
    names = [bytes([number]) for number in range(count)]
    for name in names:
        credits.attach(name)
    held, running = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for number, event in history:
        name = names[number % count]
        if event == "use" and held[name]:
            held[name] -= 1
            running[name] += 1
            credits.use(name)
        elif event == "end" and running[name]:
            running[name] -= 1
            credits.give_back(name)
        elif event == "grant":
            for front_end, more in credits.grant().items():
                assert more > 0
                held[front_end] += more
            assert sum(held.values()) + sum(running.values()) <= limit + Credits.STANDBY * count
            if sum(running.values()) < limit:
                assert all(held.values()), "there is room, and one that could not use it"


@pytest.mark.parametrize("count", [1, 2, 4])
def test_an_empty_engine_gives_all_its_room_at_once(count: int) -> None:
    credits = Credits(256)
    for number in range(count):
        credits.attach(bytes([number]))
    assert set(credits.grant().values()) == {256 // count}
    assert not credits.grant()


def test_with_no_front_end_there_is_nobody_to_grant_any_to() -> None:
    credits = Credits(8)
    credits.attach(b"last")
    credits.grant()
    credits.detach(b"last")
    assert credits.grant() == {}
