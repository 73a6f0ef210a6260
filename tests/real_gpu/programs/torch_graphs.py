# SPDX-License-Identifier: Apache-2.0
"""CUDA-graph capture and replay through PyTorch: a whole training step, and make_graphed_callables."""

import torch
from report import digest, report

torch.manual_seed(4)
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 64)).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
batch, target = torch.empty(128, 256, device="cuda"), torch.empty(128, 64, device="cuda")
batches = [(torch.randn(128, 256), torch.randn(128, 64)) for _ in range(20)]
before = [p.detach().clone() for p in model.parameters()]


def step() -> torch.Tensor:
    """One training step on the fixed buffers."""
    optimizer.zero_grad(set_to_none=False)
    loss = torch.nn.functional.mse_loss(model(batch), target)
    loss.backward()
    optimizer.step()
    return loss


def restore() -> None:
    """Back to the weights before any step."""
    with torch.no_grad():
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.copy_(old)


side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    for _ in range(3):
        step()
torch.cuda.current_stream().wait_stream(side)
restore()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = step()
restore()
replayed = []
for x, y in batches:
    batch.copy_(x)
    target.copy_(y)
    graph.replay()
    replayed.append(captured.item())
after_replay = digest(torch.cat([p.flatten() for p in model.parameters()]))
restore()
eager = []
for x, y in batches:
    batch.copy_(x)
    target.copy_(y)
    eager.append(step().item())
assert max(abs(a - b) for a, b in zip(replayed, eager, strict=True)) < 1e-4, (replayed, eager)

layer = torch.nn.Linear(64, 64).cuda()
graphed = torch.cuda.make_graphed_callables(layer, (torch.randn(8, 64, device="cuda", requires_grad=True),))
probe = torch.randn(8, 64, device="cuda", requires_grad=True)
result = graphed(probe)
result.sum().backward()

# Many replays without waiting, then one wait.
counter = torch.zeros(1024, device="cuda")
tick = torch.cuda.CUDAGraph()
with torch.cuda.graph(tick):
    counter.add_(1)
counter.zero_()
for _ in range(1000):
    tick.replay()
torch.cuda.synchronize()
assert (counter == 1000).all(), counter[:4]
report(
    {
        "losses": [v.hex() for v in replayed],
        "weights": after_replay,
        "graphed": [digest(result), digest(probe.grad)],
    }
)
