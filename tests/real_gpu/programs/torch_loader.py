# SPDX-License-Identifier: Apache-2.0
"""A DataLoader with worker processes and pinned memory, and asynchronous copies both ways on several streams."""

import torch
from report import digest, report
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    """Item i is a tensor made from i alone."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.arange(3 * 64 * 64, dtype=torch.float32).view(3, 64, 64) * 1e-3 + index, index


def main() -> None:
    """Load, copy, add up, and copy back."""
    torch.cuda.init()
    loader = DataLoader(Numbers(), batch_size=32, num_workers=3, pin_memory=True)
    total = torch.zeros(3, 64, 64, device="cuda", dtype=torch.float64)
    seen = []
    for images, indices in loader:
        assert images.is_pinned()
        on_device = images.to("cuda", non_blocking=True)
        total += on_device.double().sum(0)
        seen += indices.tolist()
    assert seen == list(range(512)), seen
    expected = torch.arange(3 * 64 * 64, dtype=torch.float32).view(3, 64, 64).mul(1e-3)
    reference = torch.stack([(expected + i).double() for i in range(512)]).sum(0)
    assert torch.allclose(total.cpu(), reference, rtol=1e-12), "the sum over the data set"

    # Copies on streams of their own, ordered by events alone.
    streams = [torch.cuda.Stream() for _ in range(4)]
    sources = [torch.randn(1 << 20).pin_memory() for _ in range(4)]
    backs = [torch.empty(1 << 20).pin_memory() for _ in range(4)]
    for _round in range(25):
        done = []
        for stream, source, back in zip(streams, sources, backs, strict=True):
            with torch.cuda.stream(stream):
                on_device = source.to("cuda", non_blocking=True)
                back.copy_(on_device * 2 + 1, non_blocking=True)
                done.append(stream.record_event())
        for event in done:
            event.synchronize()
        for source, back in zip(sources, backs, strict=True):
            assert torch.equal(back, source * 2 + 1)
        for back in backs:
            back.zero_()
    pageable = torch.randn(1 << 24)
    assert torch.equal(pageable.cuda().cpu(), pageable), "64 MiB pageable there and back"
    report({"total": digest(total)})


if __name__ == "__main__":
    main()
