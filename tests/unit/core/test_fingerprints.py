from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from convoy.core.fingerprints import MultisetDigest, canonical_json, digest, rows_digest
from convoy.core.randomness import generator, unit_interval

ROWS = st.lists(st.tuples(st.binary(max_size=8), st.binary(max_size=8)), max_size=12)


def digest_of(rows: list[tuple[bytes, bytes]]) -> str:
    total = MultisetDigest()
    for row in rows:
        total.add_row(*row)
    return total.hexdigest()


def test_digest_ignores_key_order_and_sees_values() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})
    assert canonical_json({"ä": None}) == '{"ä":null}'.encode()


@given(rows=ROWS, cut=st.integers(0, 12), seed=st.randoms())
def test_multiset_digest_ignores_order_and_adds_up_over_parts(
    rows: list[tuple[bytes, bytes]], cut: int, seed: object
) -> None:
    shuffled = list(rows)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    assert digest_of(shuffled) == digest_of(rows)
    assert MultisetDigest.total([digest_of(rows[:cut]), digest_of(rows[cut:])]) == digest_of(rows)


@given(rows=ROWS.filter(bool))
def test_multiset_digest_sees_a_lost_and_a_doubled_row(rows: list[tuple[bytes, bytes]]) -> None:
    assert len({digest_of(rows[1:]), digest_of(rows), digest_of([*rows, rows[0]])}) == 3


def test_multiset_digest_sees_where_a_field_ends() -> None:
    assert digest_of([(b"ab", b"c")]) != digest_of([(b"a", b"bc")])


def test_the_digest_of_rows_is_of_ids_and_values_however_these_lie_in_memory() -> None:
    values_NVK = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    known = digest_of([(b"a", values_NVK[0].tobytes()), (b"b", values_NVK[1].tobytes())])
    assert rows_digest(["a", "b"], values_NVK) == known
    assert rows_digest(["a", "b"], np.asfortranarray(values_NVK)) == known
    assert rows_digest(["b", "a"], values_NVK) != known


def test_randomness_is_a_function_of_its_position() -> None:
    assert generator(1, "x", 2).integers(1 << 60) == generator(1, "x", 2).integers(1 << 60)
    assert generator(1, "x", 2).integers(1 << 60) != generator(1, "x", 3).integers(1 << 60)
    draws = [unit_interval(0, str(i)) for i in range(4000)]
    assert min(draws) >= 0
    assert max(draws) < 1
    assert abs(sum(draws) / len(draws) - 0.5) < 0.02
