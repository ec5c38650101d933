"""The block pool: references, reuse by hash, eviction order, books that always balance."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.engine.blocks import BlockPool, chain_root, next_block_hash


def chain(tokens: list[list[int]], salt: str = "") -> list[bytes]:
    hashes: list[bytes] = []
    for block in tokens:
        hashes.append(next_block_hash(hashes[-1] if hashes else chain_root(salt), block))
    return hashes


def test_a_hash_stands_for_the_block_and_all_before_it() -> None:
    same = chain([[1, 2], [3, 4]])
    assert chain([[1, 2], [3, 4]]) == same
    assert chain([[9, 2], [3, 4]])[1] != same[1]
    assert chain([[2, 1]])[0] != same[0]


def test_salts_share_nothing_and_may_be_any_string() -> None:
    roots = {chain_root(salt) for salt in ("", "a", "b", "\ud800", "ab", "é" * 1000)}
    assert len(roots) == 6


def test_token_ids_do_not_run_into_each_other() -> None:
    root = chain_root("")
    assert next_block_hash(root, [1, 0]) != next_block_hash(root, [256])
    assert next_block_hash(root, [1]) != next_block_hash(root, [1, 0])


def test_hashes_are_the_same_in_every_process() -> None:
    code = "from cloudlm.engine.blocks import *; print(next_block_hash(chain_root('s'), [7]).hex())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": "77"},
    )
    assert other.stdout.strip() == next_block_hash(chain_root("s"), [7]).hex()


def test_published_blocks_are_found_until_their_space_is_needed() -> None:
    pool = BlockPool(3, 2)
    first, second = chain([[1, 2], [3, 4]])
    table = pool.allocate([], 2)
    pool.publish(table[0], first)
    pool.publish(table[1], second)
    held = list(table)
    pool.free(table)
    assert table == []
    assert pool.free_blocks == 3
    assert pool.match_prefix([first, second]) == held
    assert pool.match_prefix([second]) == [held[1]]
    pool.allocate([], 2)  # the empty one, then the end of the chain
    assert pool.match_prefix([first, second]) == [held[0]]
    pool.allocate([], 1)
    assert pool.match_prefix([first]) == []


def test_the_least_recently_used_chain_is_evicted_first() -> None:
    pool = BlockPool(2, 1)
    old, new = chain([[1]])[0], chain([[2]])[0]
    tables = [pool.allocate([], 1), pool.allocate([], 1)]
    pool.publish(tables[0][0], old)
    pool.publish(tables[1][0], new)
    pool.free(tables[0])
    pool.free(tables[1])
    again = pool.allocate(pool.match_prefix([old]), 0)
    pool.free(again)  # used just now: "new" is the older one
    pool.allocate([], 1)
    assert pool.match_prefix([old])
    assert not pool.match_prefix([new])


def test_shared_blocks_cost_nothing_and_survive_one_owner() -> None:
    pool = BlockPool(2, 1)
    known = chain([[1]])
    first = pool.allocate([], 1)
    pool.publish(first[0], known[0])
    matched = pool.match_prefix(known)
    assert pool.cost(matched, 1) == 1
    second = pool.allocate(matched, 1)
    assert pool.free_blocks == 0
    pool.free(first)
    assert pool.free_blocks == 0
    pool.check_integrity([second])
    assert not pool.append([])
    pool.free(second)
    assert pool.usage == 0.0
    assert pool.cost(matched, 0) == 1


def test_matched_blocks_are_not_evicted_for_the_fresh_ones_of_the_same_table() -> None:
    pool = BlockPool(2, 1)
    known = chain([[1]])
    table = pool.allocate([], 2)
    pool.publish(table[0], known[0])
    pool.free(table)
    again = pool.allocate(pool.match_prefix(known), 1)
    assert len(set(again)) == 2
    pool.check_integrity([again])


def test_the_same_content_computed_twice_is_known_once() -> None:
    pool = BlockPool(2, 1)
    known = chain([[1]])
    first, second = pool.allocate([], 1), pool.allocate([], 1)
    pool.publish(first[0], known[0])
    pool.publish(second[0], known[0])
    assert pool.match_prefix(known) == first
    pool.free(second)
    pool.free(first)
    pool.check_integrity([])


def test_the_check_finds_wrong_books() -> None:
    pool = BlockPool(2, 1)
    table = pool.allocate([], 1)
    pool.check_integrity([table])
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="twice"):
        pool.check_integrity([table * 2])


@given(
    st.integers(1, 8),
    st.lists(
        st.tuples(st.sampled_from("ars"), st.lists(st.integers(0, 1), max_size=5)), max_size=40
    ),
)
def test_books_balance_after_any_history(blocks_total: int, actions: list) -> None:
    pool = BlockPool(blocks_total, 1)
    tables: list[list[int]] = []
    for action, tokens in actions:
        hashes = chain([[token] for token in tokens])
        matched = pool.match_prefix(hashes)
        fresh = len(tokens) - len(matched)
        if action == "a" and tokens and pool.cost(matched, fresh) <= pool.free_blocks:
            table = pool.allocate(matched, fresh)
            for block, block_hash in zip(table, hashes, strict=True):
                pool.publish(block, block_hash)
            tables.append(table)
        elif action == "r" and tables:
            pool.free(tables.pop(len(tokens) % len(tables)))
        elif action == "s" and tables:
            pool.append(tables[-1])
        pool.check_integrity(tables)
    for table in tables:
        pool.free(table)
    pool.check_integrity([])
    assert pool.free_blocks == blocks_total
