# SPDX-License-Identifier: Apache-2.0
"""Greedy decode of a small transformer written with plain PyTorch (random weights, fixed seed, fp16, batch 1, key-value cache).

For places where importing a model library takes minutes, an emulated processor above all. The token ids and the logits must
be native's.
"""

import argparse
import time

import torch
from report import digest, report
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

VOCABULARY, WIDTH, LAYERS, HEADS, HIDDEN = 4096, 512, 6, 8, 1408

parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=48)
arguments = parser.parse_args()

began = time.perf_counter()
torch.manual_seed(11)


def weight(*shape: int) -> torch.Tensor:
    """A random matrix of moderate size, the same on every machine: made on the processor."""
    return (torch.randn(*shape) * shape[-1] ** -0.5).half().cuda()


embedding, output = weight(VOCABULARY, WIDTH), weight(VOCABULARY, WIDTH)
layers = [
    {"qkv": weight(3 * WIDTH, WIDTH), "out": weight(WIDTH, WIDTH), "gate": weight(HIDDEN, WIDTH),
     "up": weight(HIDDEN, WIDTH), "down": weight(WIDTH, HIDDEN), "cache": []}
    for _ in range(LAYERS)
]  # fmt: skip


def step(token: torch.Tensor) -> torch.Tensor:
    """Logits after one more token."""
    x = embedding[token]
    for layer in layers:
        q, k, v = (rms_norm(x, (WIDTH,)) @ layer["qkv"].T).view(1, 3, HEADS, WIDTH // HEADS).unbind(1)
        layer["cache"].append((k, v))
        keys, values = (torch.cat(part).transpose(0, 1) for part in zip(*layer["cache"], strict=True))
        attended = scaled_dot_product_attention(q.transpose(0, 1), keys, values)
        x = x + attended.transpose(0, 1).reshape(1, WIDTH) @ layer["out"].T
        y = rms_norm(x, (WIDTH,))
        x = x + (silu(y @ layer["gate"].T) * (y @ layer["up"].T)) @ layer["down"].T
    return rms_norm(x, (WIDTH,)) @ output.T


with torch.inference_mode():
    token = torch.tensor([7], device="cuda")
    tokens: list[int] = []
    first = 0.0
    for _ in range(arguments.tokens):
        logits = step(token)
        token = logits.argmax(dim=-1)
        tokens.append(int(token))
        first = first or time.perf_counter() - began
    rate = (arguments.tokens - 1) / (time.perf_counter() - began - first)
report({"tokens": tokens, "logits": digest(logits)}, seconds_to_first_token=first, tokens_per_second=rate)
