import pytest

from lmc.model.cost import PrefillCost
from lmc.model.layout import KVLayout


def test_bytes_per_token_of_smollm2() -> None:
    layout = KVLayout(L=30, G=3, D=64, dtype="float32")
    assert layout.bytes_per_token == 46_080
    assert layout.shape(7) == (30, 2, 7, 3, 64)


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'float8_e4m3fn'.*bfloat16"):
        KVLayout(1, 1, 64, "float8_e4m3fn")


def test_late_rows_cost_more() -> None:
    cost = PrefillCost(linear=10.0, attention=1.0)
    by_hand = sum(10 + p + 1 for p in range(60, 100)) / sum(10 + p + 1 for p in range(100))
    assert cost.fraction([(60, 100, 1.0)], 100) == pytest.approx(by_hand)
    assert cost.fraction([(0, 40, 1.0), (40, 100, 1.0)], 100) == pytest.approx(1.0)
