# SPDX-License-Identifier: Apache-2.0
"""cuDNN: convolutions forward and backward, pooling, batch normalisation, an LSTM, attention."""

import os

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import torch
from report import close, digest, report
from torch.nn import functional

torch.use_deterministic_algorithms(True)
torch.backends.cudnn.benchmark = False
torch.manual_seed(2)
results = {}
for kind in (torch.float32, torch.float16):
    image = torch.randn(8, 16, 64, 64).to(kind).cuda().requires_grad_()
    weight = (torch.randn(32, 16, 3, 3) * 0.1).to(kind).cuda().requires_grad_()
    out = functional.conv2d(image, weight, stride=2, padding=1)
    reference = functional.conv2d(image.double().cpu(), weight.double().cpu(), stride=2, padding=1)
    close(f"conv2d {kind}", out.double().detach().cpu(), reference.detach(), 3e-3)
    out.float().square().mean().backward()
    results[f"conv2d {kind}"] = [digest(out), digest(image.grad), digest(weight.grad)]
volume = functional.conv3d(torch.randn(2, 4, 16, 16, 16).cuda(), torch.randn(8, 4, 3, 3, 3).cuda(), padding=1)
results["conv3d"] = digest(volume)
results["transposed"] = digest(
    functional.conv_transpose2d(torch.randn(2, 8, 16, 16).cuda(), torch.randn(8, 4, 4, 4).cuda(), stride=2)
)
normalise = torch.nn.BatchNorm2d(16).cuda()
results["batch norm"] = digest(normalise(torch.randn(8, 16, 32, 32).cuda()))
recurrent = torch.nn.LSTM(64, 128, num_layers=2).cuda()
results["lstm"] = digest(recurrent(torch.randn(20, 4, 64).cuda())[0])
for kind in (torch.float16, torch.bfloat16):
    query, key, value = (torch.randn(2, 8, 333, 64).to(kind).cuda() for _ in range(3))
    attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    plain = functional.scaled_dot_product_attention(
        *(x.double().cpu() for x in (query, key, value)), is_causal=True
    )
    close(f"attention {kind}", attended.double().cpu(), plain, 2e-2)
    results[f"attention {kind}"] = digest(attended)
report(results, cudnn=torch.backends.cudnn.version())
