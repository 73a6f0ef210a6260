# SPDX-License-Identifier: Apache-2.0
"""Device code of the conformance suite: PTX that any compute capability from 7.0 on compiles, and a fatbin of it."""

from __future__ import annotations

import struct

_HEAD = ".version 6.3\n.target sm_70\n.address_size 64\n"

# fill(pointer, value, count): pointer[i] = value
# scale(pointer, factor, count): pointer[i] *= factor
# shape(pointer): one word per thread, its linear block number << 16 | its linear thread number
# reverse(pointer): the words of one block in reverse, through dynamic shared memory
# fixed(pointer): the same through 256 words of static shared memory
# globals(pointer): writes counter and table[2], then adds 1 to counter
# mixed(u8, u64, 12 bytes, u16): parameters of odd sizes; writes their sum to the u64
_BODY = """
.visible .global .align 4 .u32 counter = 7;
.visible .const .align 4 .u32 table[4] = {11, 22, 33, 44};
.extern .shared .align 16 .b8 dynamic[];

.visible .entry fill(.param .u64 fill_0, .param .u32 fill_1, .param .u32 fill_2)
{
    .reg .pred %p<2>; .reg .b32 %r<7>; .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [fill_0];
    ld.param.u32 %r1, [fill_1];
    ld.param.u32 %r2, [fill_2];
    mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ntid.x;
    mov.u32 %r5, %tid.x;
    mad.lo.s32 %r6, %r3, %r4, %r5;
    setp.ge.u32 %p1, %r6, %r2;
    @%p1 bra DONE;
    mul.wide.u32 %rd2, %r6, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r1;
DONE:
    ret;
}

.visible .entry scale(.param .u64 scale_0, .param .u32 scale_1, .param .u32 scale_2)
{
    .reg .pred %p<2>; .reg .b32 %r<9>; .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [scale_0];
    ld.param.u32 %r1, [scale_1];
    ld.param.u32 %r2, [scale_2];
    mov.u32 %r3, %ctaid.x;
    mov.u32 %r4, %ntid.x;
    mov.u32 %r5, %tid.x;
    mad.lo.s32 %r6, %r3, %r4, %r5;
    setp.ge.u32 %p1, %r6, %r2;
    @%p1 bra DONE;
    mul.wide.u32 %rd2, %r6, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.u32 %r7, [%rd3];
    mul.lo.u32 %r8, %r7, %r1;
    st.global.u32 [%rd3], %r8;
DONE:
    ret;
}

.visible .entry shape(.param .u64 shape_0)
{
    .reg .b32 %r<20>; .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [shape_0];
    mov.u32 %r1, %ctaid.x;  mov.u32 %r2, %ctaid.y;  mov.u32 %r3, %ctaid.z;
    mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y;
    mad.lo.u32 %r6, %r3, %r5, %r2;
    mad.lo.u32 %r7, %r6, %r4, %r1;
    mov.u32 %r8, %tid.x;    mov.u32 %r9, %tid.y;    mov.u32 %r10, %tid.z;
    mov.u32 %r11, %ntid.x;  mov.u32 %r12, %ntid.y;  mov.u32 %r13, %ntid.z;
    mad.lo.u32 %r14, %r10, %r12, %r9;
    mad.lo.u32 %r15, %r14, %r11, %r8;
    mul.lo.u32 %r16, %r11, %r12;
    mul.lo.u32 %r16, %r16, %r13;
    mad.lo.u32 %r17, %r7, %r16, %r15;
    shl.b32 %r18, %r7, 16;
    or.b32 %r19, %r18, %r15;
    mul.wide.u32 %rd2, %r17, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r19;
    ret;
}

.visible .entry reverse(.param .u64 reverse_0)
{
    .reg .b32 %r<10>; .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [reverse_0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ntid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.u32 %r3, [%rd3];
    mov.u32 %r4, dynamic;
    shl.b32 %r5, %r1, 2;
    add.u32 %r5, %r5, %r4;
    st.shared.u32 [%r5], %r3;
    bar.sync 0;
    sub.u32 %r6, %r2, %r1;
    sub.u32 %r6, %r6, 1;
    shl.b32 %r7, %r6, 2;
    add.u32 %r7, %r7, %r4;
    ld.shared.u32 %r8, [%r7];
    st.global.u32 [%rd3], %r8;
    ret;
}

.visible .entry fixed(.param .u64 fixed_0)
{
    .reg .b32 %r<10>; .reg .b64 %rd<4>;
    .shared .align 4 .b8 room[1024];
    ld.param.u64 %rd1, [fixed_0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ntid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.u32 %r3, [%rd3];
    mov.u32 %r4, room;
    shl.b32 %r5, %r1, 2;
    add.u32 %r5, %r5, %r4;
    st.shared.u32 [%r5], %r3;
    bar.sync 0;
    sub.u32 %r6, %r2, %r1;
    sub.u32 %r6, %r6, 1;
    shl.b32 %r7, %r6, 2;
    add.u32 %r7, %r7, %r4;
    ld.shared.u32 %r8, [%r7];
    st.global.u32 [%rd3], %r8;
    ret;
}

.visible .entry globals(.param .u64 globals_0)
{
    .reg .b32 %r<4>; .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [globals_0];
    ld.global.u32 %r1, [counter];
    st.global.u32 [%rd1], %r1;
    ld.const.u32 %r2, [table+8];
    st.global.u32 [%rd1+4], %r2;
    add.u32 %r3, %r1, 1;
    st.global.u32 [counter], %r3;
    ret;
}

.visible .entry mixed(
    .param .u8 mixed_0, .param .u64 mixed_1, .param .align 4 .b8 mixed_2[12], .param .u16 mixed_3)
{
    .reg .b16 %h<3>; .reg .b32 %r<9>; .reg .b64 %rd<2>;
    ld.param.u8 %h1, [mixed_0];
    ld.param.u64 %rd1, [mixed_1];
    ld.param.u32 %r1, [mixed_2];
    ld.param.u32 %r2, [mixed_2+4];
    ld.param.u32 %r3, [mixed_2+8];
    ld.param.u16 %h2, [mixed_3];
    cvt.u32.u16 %r4, %h1;
    cvt.u32.u16 %r5, %h2;
    add.u32 %r6, %r1, %r2;
    add.u32 %r6, %r6, %r3;
    add.u32 %r6, %r6, %r4;
    add.u32 %r6, %r6, %r5;
    st.global.u32 [%rd1], %r6;
    ret;
}

.visible .entry bounded(.param .u64 bounded_0) .maxntid 64, 1, 1
{
    ret;
}

.visible .entry nothing()
{
    ret;
}

.visible .entry wild(.param .u64 wild_0)
{
    .reg .b32 %r<2>; .reg .b64 %rd<2>;
    ld.param.u64 %rd1, [wild_0];
    mov.u32 %r1, 1;
    st.global.u32 [%rd1], %r1;
    ret;
}

.visible .entry trapped()
{
    trap;
    ret;
}
"""

PTX = (_HEAD + _BODY).encode() + b"\0"
BROKEN_PTX = (_HEAD + ".visible .entry broken() { add.nonsense %r1, %r2; ret; }\n").encode() + b"\0"


def fatbin(text: bytes = PTX, architecture: int = 70) -> bytes:
    """A fatbin with one plain PTX entry, as nvcc writes it without compression."""
    payload = text + bytes(-len(text) % 8)
    entry = struct.pack(
        "<HHIQIIHHIIIQQQQQ", 1, 0x101, 80, len(payload), 0, 0x40, 3, 6, architecture, 0, 0, 0x11, 0, 0, 72, 0
    )
    body = entry + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
