"""Text that databases refuse: what is said at a look is what the escaping itself does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloudlm.state.tables import is_storable, storable

_PARTS = st.sampled_from(["a", "é", "\\", "\0", "\ud800", "\udfff", "日", "\\u0000", " "])


@given(st.lists(_PARTS).map("".join) | st.text())
def test_storable_is_what_is_kept_as_it_is(value: str) -> None:
    assert is_storable(value) == (storable(value) == value)
