# SPDX-License-Identifier: Apache-2.0
"""cuBLAS and cuBLASLt through PyTorch: GEMMs of four types, bit for bit, and each against a float64 product."""

import torch
from report import close, digest, report

torch.manual_seed(1)
results, errors = {}, {}
for name, kind, tolerance in (
    ("fp32", torch.float32, 1e-5),
    ("fp16", torch.float16, 2e-3),
    ("bf16", torch.bfloat16, 2e-2),
    ("fp64", torch.float64, 1e-13),
):
    for size in (37, 512, 2048):
        a = torch.randn(size, size, dtype=torch.float64)
        b = torch.randn(size, size, dtype=torch.float64)
        left, right = a.to(kind).cuda(), b.to(kind).cuda()
        product = left @ right
        reference = left.double().cpu() @ right.double().cpu()
        errors[f"{name} {size}"] = close(f"{name} {size}", product.double().cpu(), reference, tolerance)
        results[f"{name} {size}"] = digest(product)
torch.backends.cuda.matmul.allow_tf32 = True
x, y = torch.randn(1024, 1024).cuda(), torch.randn(1024, 1024).cuda()
results["tf32 1024"] = digest(x @ y)
results["batched"] = digest(torch.bmm(torch.randn(16, 64, 96).cuda(), torch.randn(16, 96, 80).cuda()))
weights = torch.nn.Linear(768, 3072).half().cuda()  # bias epilogue: cuBLASLt
results["linear fp16"] = digest(weights(torch.randn(32, 768).half().cuda()))
results["large bf16"] = digest(
    torch.randn(8192, 4096).bfloat16().cuda() @ torch.randn(4096, 8192).bfloat16().cuda()
)
if hasattr(torch, "_int_mm"):
    left = torch.randint(-128, 127, (256, 256), dtype=torch.int8)
    right = torch.randint(-128, 127, (256, 256), dtype=torch.int8)
    product = torch._int_mm(left.cuda(), right.cuda())
    assert torch.equal(product.cpu(), left.int() @ right.int()), "int8 product"
    results["int8"] = digest(product)
report(results, device=torch.cuda.get_device_name(), relative_errors=errors)
