"""Routes over several models: the setting, the shares, the order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core.errors import BadSetting
from cloudlm.gateway.model_routes import ModelRoute, Target, level_shares, order, read_routes

HEALTHS = st.lists(st.floats(0, 1), min_size=1, max_size=5)
DRAWS = st.floats(0, 1, exclude_max=True)


def route(text: str) -> ModelRoute:
    return read_routes(f"chat = {text}")["chat"]


def well(_: str) -> float:
    return 1.0


def dead(*names: str) -> Callable[[str], float]:
    return lambda model: 0.0 if model in names else 1.0


class TestSetting:
    def test_all_of_a_route(self) -> None:
        found = read_routes("chat = a:9 + b-1:0.5 | c > d > e ^ f ^ g;\n fast=a\n;")
        assert set(found) == {"chat", "fast"}
        assert found["chat"] == ModelRoute(
            "chat",
            ((Target("a", 9.0), Target("b-1", 0.5)), (Target("c"),)),
            ("d", "e"),
            ("f", "g"),
        )
        assert found["chat"].models == ("a", "b-1", "c", "d", "e", "f", "g")
        assert read_routes(" \n;") == {}

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("chat", "no '='"),
            ("chat =", "not valid"),
            ("= a", "not valid"),
            ("chat = a:0", "weight"),
            ("chat = a:x", "weight"),
            ("chat = a:nan", "weight"),
            ("chat = a:inf", "weight"),
            ("chat = a:1e7", "weight"),
            ("chat = a + a", "two shares"),
            ("chat = a | a", "two shares"),
            ("chat = a >", "not valid"),
            ("chat = a ^ B", "not valid"),
            ("chat = a > b:2", "not valid"),
            ("Chat = a", "not valid"),
            ("chat = a; chat = b", "named twice"),
        ],
    )
    def test_faults_are_named(self, text: str, why: str) -> None:
        with pytest.raises(BadSetting, match=r"^gateway.routes: ") as caught:
            read_routes(text)
        assert why in caught.value.message
        assert "chat = small:9" in caught.value.message

    def test_only_what_a_key_may_use(self) -> None:
        left = route("a + b | c > d ^ a").only(lambda name: name in "bd")
        assert left == ModelRoute("chat", ((Target("b"),),), ("d",), ())
        assert order(left, well, 0.0) == ("b", "d")
        assert order(route("a > d").only(lambda name: name == "d"), well, 0.9) == ("d",)
        assert order(route("a").only(lambda _: False), well, 0.5) == ()


class TestShares:
    @pytest.mark.parametrize(
        ("healths", "shares"),
        [  # Envoy's own table, docs/.../load_balancing/priority
            ([1.0, 1.0], [100, 0]),
            ([0.72, 0.72], [100, 0]),
            ([0.71, 0.71], [99.4, 0.6]),
            ([0.50, 0.50], [70, 30]),
            ([0.25, 1.0], [35, 65]),
            ([0.0, 1.0], [0, 100]),
            ([0.25, 0.25], [50, 50]),
            ([0.0, 0.0], [100, 0]),
            ([0.2, 0.2, 0.2], [100 / 3] * 3),
        ],
    )
    def test_envoys_numbers(self, healths: list[float], shares: list[float]) -> None:
        assert [100 * one for one in level_shares(healths)] == pytest.approx(shares)

    @given(HEALTHS)
    def test_they_sum_to_one_and_go_to_who_is_there(self, healths: list[float]) -> None:
        shares = level_shares(healths)
        assert sum(shares) == pytest.approx(1.0)
        assert all(share >= 0.0 for share in shares)
        if any(healths):
            assert all(share <= 1e-9 for share, one in zip(shares, healths, strict=True) if not one)

    @given(HEALTHS, st.integers(0, 4), st.floats(0, 1))
    def test_a_level_that_recovers_never_gets_less(
        self, healths: list[float], number: int, better: float
    ) -> None:
        number %= len(healths)
        before = level_shares(healths)[number] if any(healths) else 0.0
        healths[number] = max(healths[number], better)
        assert level_shares(healths)[number] >= before - 1e-9


class TestOrder:
    def test_weights_are_kept(self) -> None:
        chance, split = random.Random(3), route("a:7 + b:2 + c:1")
        firsts = Counter(order(split, well, chance.random())[0] for _ in range(10_000))
        for name, share in (("a", 7000), ("b", 2000), ("c", 1000)):
            assert firsts[name] == pytest.approx(share, abs=200)

    @given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(50, 500))
    def test_even_draws_give_exact_shares(self, weights: list[float], draws: int) -> None:
        names = [f"m{n}" for n in range(len(weights))]
        text = " + ".join(f"{n}:{w!r}" for n, w in zip(names, weights, strict=True))
        split = route(text)
        firsts = Counter(order(split, well, n / draws)[0] for n in range(draws))
        for name, weight in zip(names, weights, strict=True):
            assert abs(firsts[name] - draws * weight / sum(weights)) <= 1.01

    @given(DRAWS)
    def test_the_dead_are_asked_last(self, draw: float) -> None:
        split = route("a:7 + b:1 | c > d")
        assert order(split, dead("a"), draw)[0] == "b" or draw >= 0.175  # 1.4 of an eighth
        assert order(split, dead("a"), draw)[-1] == "a"
        assert order(split, dead("a", "b"), draw) == ("c", "d", "a", "b")
        assert order(split, dead("a", "b", "c"), draw)[0] == "d"
        assert set(order(split, dead("a", "b", "c", "d"), draw)[:2]) == {"a", "b"}

    @given(st.floats(0, 1), DRAWS)
    def test_each_model_once_and_never_a_fallback_first(self, health: float, draw: float) -> None:
        split = route("a:2 + b | c > d > a ^ e")
        found = order(split, lambda model: health if model in "ab" else 1.0, draw)
        assert sorted(found) == ["a", "b", "c", "d"]
        assert found[0] != "d"

    def test_a_level_spills_as_its_replicas_go(self) -> None:
        split = route("a | b")
        firsts = Counter(
            order(split, lambda model: 0.5 if model == "a" else 1.0, n / 1000)[0]
            for n in range(1000)
        )
        assert firsts["a"] == pytest.approx(700, abs=1)
