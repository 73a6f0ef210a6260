# SPDX-License-Identifier: Apache-2.0
"""A training loop of 300 steps under deterministic settings: every loss and the final weights must be native's."""

import os

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import torch
from report import digest, report
from torch import nn

STEPS = 300
torch.use_deterministic_algorithms(True)
torch.backends.cudnn.benchmark = False
torch.manual_seed(3)


class Net(nn.Module):
    """Convolutions, a transformer layer, dropout: the kinds of kernels a small model launches."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.mix = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Class scores of a batch of 16 by 16 images."""
        tokens = self.features(image).flatten(2).transpose(1, 2)
        return self.head(self.mix(tokens).mean(1))


model = Net().cuda()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
centres = torch.randn(10, 3, 16, 16, device="cuda")
losses = []
for _step in range(STEPS):
    labels = torch.randint(0, 10, (64,), device="cuda")
    images = centres[labels] + 0.9 * torch.randn(64, 3, 16, 16, device="cuda")
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], f"the loss went from {losses[0]} to {losses[-1]}"
weights = digest(torch.cat([p.flatten() for p in model.parameters()]))
report({"losses": [value.hex() for value in losses], "weights": weights}, first=losses[0], last=losses[-1])
