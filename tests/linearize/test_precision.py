"""Whether a run computes in bfloat16 is found out by timing, and never at great cost."""

import pytest
import torch

from lion_hf.linearize import precision


@pytest.mark.parametrize(
    ("small", "large", "faster"),
    [(1.0, 4.0, True), (0.9, 1.2, False), (0.02, 4.0, False)],
    ids=["faster", "hardly faster", "much slower"],
)
def test_a_slow_type_is_never_tried_on_a_large_product(small, large, faster, monkeypatch):
    advantages, sizes = {precision.SMALL: small, precision.SIZE: large}, []

    def rate(device, dtype, size, seconds):
        sizes.append(size)
        return advantages[size] if dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(precision, "matmul_rate", rate)
    assert precision.bf16_is_faster(torch.device("cpu")) == faster
    assert (precision.SIZE in sizes) == (small > precision.SLOWER)


def test_the_smaller_product_is_cheap():
    assert 64 <= precision.SMALL <= precision.SIZE / 8  # at least 512 times fewer operations
