# SPDX-License-Identifier: Apache-2.0
"""Write a small, valid llama-architecture GGUF file whose greedy output is known beforehand: the model counts.

After any text it says " 1 2 3 4 ...", after "... 7" it says " 8 9 10 ...", up to 3999 and then the end of text. Row i
of the input embedding is a random vector e_i of signs, and row succ(i) of the output matrix is a scaled e_i, so the
final hidden state (e_i plus bounded noise) has its largest product with succ(i). All attention and feed-forward
weights are random and really take part: they move the logits. Their summed effect is bounded (``--noise``, RMS ratio
to the embedding), so the greedy text is the same on every processor and for every quantisation, while the
log-probabilities still show any wrong kernel.

Needs NumPy only; GGUF version 3 is written by hand. Presets: nano (3.7 MB as q8_0), tiny (31 MB), 1b (1.6 GB), ...

    make_tiny_gguf.py tiny.gguf
    make_tiny_gguf.py big.gguf --preset 1b --type f16
"""

from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Preset(NamedTuple):
    """Dimensions of one model. ``vocabulary`` 0 means just what the tokenizer needs."""

    layers: int
    width: int
    heads: int
    key_value_heads: int
    feed_forward: int
    vocabulary: int
    rope_base: float
    context: int


PRESETS = {
    "nano": Preset(2, 256, 4, 2, 512, 0, 10000.0, 4096),
    "tiny": Preset(8, 512, 8, 4, 1536, 0, 10000.0, 4096),
    "1b": Preset(16, 2048, 32, 8, 8192, 128256, 500000.0, 131072),
    "3b": Preset(28, 3072, 24, 8, 8192, 128256, 500000.0, 131072),
    "8b": Preset(32, 4096, 32, 8, 14336, 128256, 500000.0, 131072),
}
TENSOR_TYPE = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
FILE_TYPE = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}
BLOCK = {"f32": (1, 4), "f16": (1, 2), "q4_0": (32, 18), "q8_0": (32, 34)}  # elements, bytes
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
ALIGNMENT = 32


def gguf_string(text: str) -> bytes:
    """Length, then UTF-8."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(key: str, kind: int, value: Any, element: int = 0) -> bytes:
    """One metadata entry; ``element`` is the type of an array's elements."""
    head = gguf_string(key) + struct.pack("<I", kind)
    if kind == ARRAY:
        head += struct.pack("<IQ", element, len(value))
        if element == STRING:
            return head + b"".join(gguf_string(item) for item in value)
        return head + np.asarray(value, "<i4").tobytes()
    if kind == STRING:
        return head + gguf_string(value)
    return head + struct.pack({U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}[kind], value)


def quantise(values: Floats, kind: str) -> bytes:
    """The bytes of a tensor, row-major, last dimension a multiple of 32; rounding as ggml's own reference does it."""
    if kind == "f32":
        return values.astype("<f4").tobytes()
    if kind == "f16":
        return values.astype("<f2").tobytes()
    blocks = values.reshape(-1, 32)
    if kind == "q8_0":
        scale = np.abs(blocks).max(1) / 127.0
        inverse = np.where(scale > 0, 1.0 / np.where(scale > 0, scale, 1), 0)
        out = np.empty((blocks.shape[0], 34), np.uint8)
        out[:, :2] = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
        out[:, 2:] = np.rint(blocks * inverse[:, None]).astype(np.int8).view(np.uint8)
        return out.tobytes()
    scale = blocks[np.arange(blocks.shape[0]), np.abs(blocks).argmax(1)] / -8.0
    inverse = np.where(scale != 0, 1.0 / np.where(scale != 0, scale, 1), 0)
    nibbles = np.clip((blocks * inverse[:, None] + 8.5).astype(np.int32), 0, 15).astype(np.uint8)
    out = np.empty((blocks.shape[0], 18), np.uint8)
    out[:, :2] = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
    out[:, 2:] = nibbles[:, :16] | (nibbles[:, 16:] << 4)
    return out.tobytes()


class Tokenizer(NamedTuple):
    """A GPT-2 style byte-pair tokenizer over printable ASCII, and which token follows which."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    successor: dict[int, int]


def make_tokenizer(vocabulary: int) -> Tokenizer:
    """Special tokens, single characters, and " 1" to " 3999", each made from its prefix; padded to ``vocabulary``."""
    special = ["<|bos|>", "<|endoftext|>", "<|pad|>"]
    space, newline = "\u0120", "\u010a"  # GPT-2's characters for these two bytes
    characters = [newline, space, *(chr(code) for code in range(33, 127))]
    tokens = special + characters
    types = [3] * len(special) + [1] * len(characters)
    merges = []
    numbers = range(1, 4000)
    for number in numbers:  # ascending, so every prefix comes first
        text = str(number)
        merges.append(f"{space + text[:-1]} {text[-1]}")
        tokens.append(space + text)
        types.append(1)
    ids = {token: index for index, token in enumerate(tokens)}
    successor = dict.fromkeys(range(len(tokens)), ids[space + "1"])
    for number in numbers:
        following = ids[space + str(number + 1)] if number < numbers[-1] else ids["<|endoftext|>"]
        successor[ids[space + str(number)]] = following
    for digit in range(10):
        successor[ids[str(digit)]] = ids[space + str(digit + 1)]
    for index in range(len(tokens), max(vocabulary, -(-len(tokens) // 64) * 64)):
        tokens.append(f"<|unused_{index}|>")
        types.append(5)
    return Tokenizer(tokens, types, merges, successor)


class Weights:
    """Makes the tensors of one model, in the order in which they are drawn from the generator."""

    def __init__(self, preset: Preset, tokenizer: Tokenizer, noise: float, seed: int) -> None:
        self._preset, self._successor, self._noise = preset, tokenizer.successor, noise
        self._rows = len(tokenizer.tokens)
        self._generator = np.random.default_rng(seed)
        self._pool = self._generator.standard_normal(1 << 22, dtype=np.float32)
        signs = np.array([-1, 1], np.float32)
        self.embedding: Floats = self._generator.choice(signs, (self._rows, preset.width))
        # About a hundred tokens are followed by " 1". They share one direction (15 % of the signs flipped), or their
        # sum in that one output row would be as loud as a right answer.
        self._first = next(iter(self._successor.values()))
        followed = [token for token, after in self._successor.items() if after == self._first]
        self._common: Floats = self._generator.choice(signs, preset.width)
        flips = self._generator.choice(signs, (len(followed), preset.width), p=[0.15, 0.85])
        self.embedding[followed] = self._common * flips

    def random(self, rows: int, columns: int, deviation: float) -> Floats:
        """Normal numbers cut from a pool of four million, each repetition with a sign of its own."""
        count = rows * columns
        repeats = -(-count // self._pool.size) + 1
        offset = int(self._generator.integers(self._pool.size))
        signs = self._generator.choice(np.array([-1, 1], np.float32), repeats)
        values = np.concatenate([self._pool * sign for sign in signs])[offset : offset + count]
        return (values * np.float32(deviation)).reshape(rows, columns)

    def output(self) -> Floats:
        """The output matrix: each row points at the tokens that it follows."""
        width = self._preset.width
        target = float(
            np.log(self._rows) + 3
        )  # the right token's logit; the others are about N(0, target/sqrt(width))
        matrix = self.random(self._rows, width, target / width)
        sources: dict[int, list[int]] = {}
        for token, after in self._successor.items():
            sources.setdefault(after, []).append(token)
        for after, tokens in sources.items():
            direction = self._common if after == self._first else self.embedding[tokens].sum(0)
            matrix[after] = direction * (target / width) * 1.15
        return matrix

    def tensors(self, kind: str) -> Iterator[tuple[str, tuple[int, ...], str, Callable[[], Floats]]]:
        """Name, shape, type and maker of each tensor; call the makers in this order."""
        layers, width, heads, key_value_heads, feed_forward = self._preset[:5]
        key_value = key_value_heads * (width // heads)
        quiet = self._noise / float(np.sqrt(2 * layers))

        def ones() -> Floats:
            return np.ones(width, np.float32)

        def matrix(
            rows: int, columns: int, deviation: float
        ) -> tuple[tuple[int, int], str, Callable[[], Floats]]:
            return (rows, columns), kind, lambda: self.random(rows, columns, deviation)

        yield "token_embd.weight", (self._rows, width), kind, lambda: self.embedding
        for layer in range(layers):
            name = f"blk.{layer}."
            plain = width**-0.5
            yield name + "attn_norm.weight", (width,), "f32", ones
            yield name + "attn_q.weight", *matrix(width, width, plain)
            yield name + "attn_k.weight", *matrix(key_value, width, plain)
            yield name + "attn_v.weight", *matrix(key_value, width, plain)
            yield name + "attn_output.weight", *matrix(width, width, quiet * plain)
            yield name + "ffn_norm.weight", (width,), "f32", ones
            yield name + "ffn_gate.weight", *matrix(feed_forward, width, plain)
            yield name + "ffn_up.weight", *matrix(feed_forward, width, plain)
            yield name + "ffn_down.weight", *matrix(width, feed_forward, 2 * quiet * feed_forward**-0.5)
        yield "output_norm.weight", (width,), "f32", ones
        yield "output.weight", (self._rows, width), kind, self.output


def metadata(name: str, kind: str, preset: Preset, tokenizer: Tokenizer) -> list[bytes]:
    """The key-value section."""
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return [
        gguf_value("general.architecture", STRING, "llama"),
        gguf_value("general.name", STRING, f"counter-{name}"),
        gguf_value("general.file_type", U32, FILE_TYPE[kind]),
        gguf_value("general.quantization_version", U32, 2),
        gguf_value("general.alignment", U32, ALIGNMENT),
        gguf_value("llama.context_length", U32, preset.context),
        gguf_value("llama.embedding_length", U32, preset.width),
        gguf_value("llama.block_count", U32, preset.layers),
        gguf_value("llama.feed_forward_length", U32, preset.feed_forward),
        gguf_value("llama.attention.head_count", U32, preset.heads),
        gguf_value("llama.attention.head_count_kv", U32, preset.key_value_heads),
        gguf_value("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        gguf_value("llama.rope.dimension_count", U32, preset.width // preset.heads),
        gguf_value("llama.rope.freq_base", F32, preset.rope_base),
        gguf_value("llama.vocab_size", U32, len(tokenizer.tokens)),
        gguf_value("tokenizer.ggml.model", STRING, "gpt2"),
        gguf_value("tokenizer.ggml.pre", STRING, "gpt-2"),
        gguf_value("tokenizer.ggml.tokens", ARRAY, tokenizer.tokens, STRING),
        gguf_value("tokenizer.ggml.token_type", ARRAY, tokenizer.types, I32),
        gguf_value("tokenizer.ggml.merges", ARRAY, tokenizer.merges, STRING),
        gguf_value("tokenizer.ggml.bos_token_id", U32, 0),
        gguf_value("tokenizer.ggml.eos_token_id", U32, 1),
        gguf_value("tokenizer.ggml.padding_token_id", U32, 2),
        gguf_value("tokenizer.ggml.add_bos_token", BOOL, False),
        gguf_value("tokenizer.chat_template", STRING, template),
    ]


def write_model(
    out: Path, preset_name: str = "tiny", kind: str = "q8_0", noise: float = 0.5, seed: int = 1
) -> int:
    """Write the file and return its size in bytes. The same arguments give the same bytes."""
    preset = PRESETS[preset_name]
    tokenizer = make_tokenizer(preset.vocabulary)
    tensors = list(Weights(preset, tokenizer, noise, seed).tensors(kind))
    entries = metadata(preset_name, kind, preset, tokenizer)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries)
    offset = 0
    for name, shape, tensor_kind, _make in tensors:
        elements, size = BLOCK[tensor_kind]
        head += gguf_string(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", dimension) for dimension in reversed(shape))
        head += struct.pack("<IQ", TENSOR_TYPE[tensor_kind], offset)
        offset += -(-int(np.prod(shape)) // elements * size // ALIGNMENT) * ALIGNMENT
    with out.open("wb") as file:
        file.write(head + b"\0" * (-len(head) % ALIGNMENT))
        for name, shape, tensor_kind, make in tensors:
            values = make()
            if values.shape != shape:
                raise AssertionError(f"{name} is {values.shape}, meant to be {shape}")
            data = quantise(values, tensor_kind)
            file.write(data + b"\0" * (-len(data) % ALIGNMENT))
        return file.tell()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--type", choices=TENSOR_TYPE, default="q8_0")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0.5)
    options = parser.parse_args()
    size = write_model(options.out, options.preset, options.type, options.noise, options.seed)
    print(f"{options.out}: {size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
