# SPDX-License-Identifier: Apache-2.0
"""torch.compile: Inductor writes Triton kernels, compiles and launches them."""

import torch
from report import close, digest, report

torch.manual_seed(7)


def work(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A fusion, a reduction and a matrix product."""
    z = torch.nn.functional.gelu(x * 2 + y).softmax(-1)
    return (z @ y.T).sum(0)


x, y = torch.randn(512, 384), torch.randn(512, 384)
compiled = torch.compile(work)(x.cuda(), y.cuda())
close("compiled", compiled.double().cpu(), work(x.double(), y.double()), 1e-3)
report({"result": digest(compiled)})
