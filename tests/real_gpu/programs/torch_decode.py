# SPDX-License-Identifier: Apache-2.0
"""Greedy decode of a Llama-shaped model made on the spot (random weights, fixed seed, fp16, batch 1), eager.

The token ids must be native's. With ``--time N`` it decodes N more times and reports tokens a second of each.
"""

import argparse
import time

import torch
from report import digest, report
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--time", type=int, default=0, help="timed decodes")
parser.add_argument("--tokens", type=int, default=64)
arguments = parser.parse_args()

torch.manual_seed(6)
config = LlamaConfig(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=8,
    max_position_embeddings=2048,
)
with torch.device("cuda"):
    torch.set_default_dtype(torch.float16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
prompt = torch.arange(1, 33, device="cuda").unsqueeze(0)


def decode(count: int) -> list[int]:
    """The ids of ``count`` greedy tokens after the prompt."""
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :].tolist()


with torch.inference_mode():
    tokens = decode(arguments.tokens)
    logits = model(prompt).logits
    rates = []
    for _ in range(arguments.time):
        torch.cuda.synchronize()
        began = time.perf_counter()
        assert decode(arguments.tokens) == tokens, "a second decode gave other tokens"
        torch.cuda.synchronize()
        rates.append(arguments.tokens / (time.perf_counter() - began))
assert len(tokens) == arguments.tokens
report({"tokens": tokens, "logits": digest(logits)}, tokens_per_second=rates)
