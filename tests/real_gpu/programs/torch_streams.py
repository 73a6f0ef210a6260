# SPDX-License-Identifier: Apache-2.0
"""Streams, events, timing, the caching allocator, out of memory, peers, and what the device says of itself."""

import torch
from report import report

properties = torch.cuda.get_device_properties(0)
equal = {
    "count": torch.cuda.device_count(),
    "name": properties.name,
    "capability": torch.cuda.get_device_capability(),
    "multiprocessors": properties.multi_processor_count,
    "l2": properties.L2_cache_size,
    "shared": properties.shared_memory_per_block_optin,
    "warp": properties.warp_size,
    "total": properties.total_memory,
    "bf16": torch.cuda.is_bf16_supported(),
}
# Order through events: each stream waits for the one before and adds to what it wrote.
value = torch.zeros(1 << 16, device="cuda")
torch.cuda.synchronize()
previous = None
for _ in range(50):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        if previous is not None:
            stream.wait_event(previous)
        value.mul_(2).add_(1).remainder_(8191)
        previous = stream.record_event()
previous.synchronize()
expected = 0.0
for _ in range(50):
    expected = (expected * 2 + 1) % 8191
assert (value == expected).all(), (value[0].item(), expected)
equal["chain"] = expected

start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
big = torch.randn(4096, 4096, device="cuda")
torch.cuda.synchronize()
start.record()
for _ in range(20):
    product = big @ big
stop.record()
assert stop.query() in (True, False)
stop.synchronize()
milliseconds = start.elapsed_time(stop)
assert 0.5 < milliseconds < 5000, milliseconds

free, total = torch.cuda.mem_get_info()
assert 0 < free <= total
try:
    torch.empty(total * 2, dtype=torch.uint8, device="cuda")
    refused = False
except torch.OutOfMemoryError:
    refused = True
assert refused
assert (torch.ones(8, device="cuda") + 1).sum().item() == 16, (
    "after running out of memory the device still works"
)
held = [torch.empty(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(8)]
assert torch.cuda.memory_allocated() >= 8 << 28
del held, big, product
torch.cuda.empty_cache()
equal["random"] = torch.cuda.FloatTensor(4).normal_(generator=torch.Generator("cuda").manual_seed(5)).tolist()
equal["sorted"] = torch.arange(100000, device="cuda").flip(0).sort().values[:5].tolist()
equal["cumsum"] = torch.ones(100000, device="cuda").cumsum(0)[-1].item()
torch.cuda.nvtx.range_push("a range")
torch.cuda.nvtx.range_pop()
report(equal, milliseconds=milliseconds, free=free)
