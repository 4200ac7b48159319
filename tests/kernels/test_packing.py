# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_dq_kernels import pack_int4, unpack_int4
from diffusers_dq_kernels.packing import pack_int6, unpack_int6


@given(n=st.integers(0, 9), half=st.integers(0, 40), seed=st.integers(0, 99))
def test_unpack_inverts_pack(n: int, half: int, seed: int) -> None:
    q = torch.randint(-8, 8, (n, 2 * half), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8 and packed.shape == (n, half)
    assert torch.equal(unpack_int4(packed), q)


def test_every_byte_unpacks_to_its_nibbles() -> None:
    packed = torch.arange(256, dtype=torch.uint8)[None]
    low, high = unpack_int4(packed).view(256, 2).unbind(1)
    signed = [value - 16 if value > 7 else value for value in range(16)]
    assert low.tolist() == signed * 16
    assert high.tolist() == [value for value in signed for _ in range(16)]
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


def test_layout_is_low_nibble_first() -> None:
    assert pack_int4(torch.tensor([[1, -1, -8, 7]], dtype=torch.int8)).tolist() == [[0xF1, 0x78]]


def test_unpack_reads_strided_views_and_leaves_them_alone() -> None:
    packed = torch.randint(0, 256, (6, 20), dtype=torch.uint8)
    before = packed.clone()
    assert torch.equal(unpack_int4(packed[::2, 3:10]), unpack_int4(packed[::2, 3:10].contiguous()))
    assert torch.equal(packed, before)


def test_bad_arguments_say_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"K even, got torch.int8 \[2, 3\]"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"values in \[-8, 7\], got \[0, 8\]"):
        pack_int4(torch.tensor([[0, 8]], dtype=torch.int8))
    with pytest.raises(ValueError, match="expected int8"):
        pack_int4(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="expected uint8"):
        unpack_int4(torch.zeros(2, 4, dtype=torch.int8))


@given(n=st.integers(0, 9), quarter=st.integers(0, 20), seed=st.integers(0, 99))
def test_unpack_inverts_pack_in_six_bits(n: int, quarter: int, seed: int) -> None:
    q = torch.randint(-32, 32, (n, 4 * quarter), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = pack_int6(q)
    assert packed.dtype == torch.uint8 and packed.shape == (n, 3 * quarter)
    assert torch.equal(unpack_int6(packed), q)


def test_six_bits_are_a_little_endian_word_of_four() -> None:
    """Every value in every place, against the formula of the docstring; and every word comes from some values."""
    for place in range(4):
        q = torch.zeros(64, 4, dtype=torch.int8)
        q[:, place] = torch.arange(-32, 32)
        words = [(int(value) & 63) << (6 * place) for value in q[:, place]]
        assert pack_int6(q).tolist() == [list(word.to_bytes(3, "little")) for word in words]
    packed = torch.randint(0, 256, (64, 30), dtype=torch.uint8)
    assert torch.equal(pack_int6(unpack_int6(packed)), packed)


def test_six_bits_of_strided_views() -> None:
    q = torch.randint(-32, 32, (6, 20), dtype=torch.int8)
    assert torch.equal(pack_int6(q[::2, 3:11]), pack_int6(q[::2, 3:11].contiguous()))
    packed = torch.randint(0, 256, (6, 20), dtype=torch.uint8)
    before = packed.clone()
    assert torch.equal(unpack_int6(packed[::2, 4:10]), unpack_int6(packed[::2, 4:10].contiguous()))
    assert torch.equal(packed, before)


def test_bad_arguments_of_six_bits_say_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"K a multiple of 4, got torch.int8 \[2, 6\]"):
        pack_int6(torch.zeros(2, 6, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"values in \[-32, 31\], got \[-33, 0\]"):
        pack_int6(torch.tensor([[0, 0, -33, 0]], dtype=torch.int8))
    with pytest.raises(ValueError, match="pack_int6: expected int8"):
        pack_int6(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"a multiple of 3, got torch.uint8 \[2, 4\]"):
        unpack_int6(torch.zeros(2, 4, dtype=torch.uint8))
