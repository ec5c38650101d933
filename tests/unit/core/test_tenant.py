"""Tenants' weights as a person writes them."""

import pytest

from cloudlm.core.errors import BadSetting
from cloudlm.core.tenant import read_weights


def test_weights_are_read_by_name() -> None:
    assert read_weights("") == {}
    assert read_weights(" acme = 2, a=b=0.5,") == {"acme": 2.0, "a=b": 0.5}


@pytest.mark.parametrize("text", ["acme", "acme=", "=2", "a=1,b=0", "a=-1", "a=nan", "a=1e9"])
def test_a_weight_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadSetting, match=r"gateway\.tenant_weights"):
        read_weights(text)
