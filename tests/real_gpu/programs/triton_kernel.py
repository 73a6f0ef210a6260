# SPDX-License-Identifier: Apache-2.0
"""Triton: a fused softmax and a tiled matrix product, compiled to a cubin and launched through the driver API."""

import torch
import triton
import triton.language as tl
from report import close, digest, report


@triton.jit
def softmax(out, source, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    values = tl.load(source + row * columns + offsets, mask=offsets < columns, other=-float("inf"))
    values = tl.exp(values - tl.max(values, axis=0))
    tl.store(out + row * columns + offsets, values / tl.sum(values, axis=0), mask=offsets < columns)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        left = tl.load(a + rows[:, None] * K + inner[None, :])
        right = tl.load(b + inner[:, None] * N + columns[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + rows[:, None] * N + columns[None, :], total)


torch.manual_seed(10)
x = torch.randn(777, 1000, device="cuda")
out = torch.empty_like(x)
softmax[(777,)](out, x, 1000, BLOCK=1024)
close("softmax", out.double().cpu(), x.double().cpu().softmax(-1), 1e-6)
left, right = torch.randn(512, 256, device="cuda").half(), torch.randn(256, 384, device="cuda").half()
product = torch.empty(512, 384, device="cuda")
matmul[(8, 6)](left, right, product, 512, 384, 256, BM=64, BN=64, BK=32)
close("matmul", product.double().cpu(), left.double().cpu() @ right.double().cpu(), 1e-3)
report({"softmax": digest(out), "matmul": digest(product)}, triton=triton.__version__)
