# SPDX-License-Identifier: Apache-2.0
"""Who a guest is: the kernel's credentials decide, not what it says."""

from __future__ import annotations

import pytest

from vgpu.actors.listener import vm_name_for
from vgpu.transport.attach import Hello


@pytest.mark.parametrize(
    ("asked", "uid", "expected"),
    [
        ("user1", 0, "user1"),
        ("user1", 500, "user1"),
        ("user1", 1000, "local-1000"),
        ("", 500, "local-500"),
        ("local-0", 1000, "local-1000"),
    ],
)
def test_only_root_and_the_owner_may_name_a_vm(asked: str, uid: int, expected: str) -> None:
    assert vm_name_for(Hello(1, 2, vm=asked), uid, owner=500) == expected
