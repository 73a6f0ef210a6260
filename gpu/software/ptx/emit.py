# SPDX-License-Identifier: Apache-2.0
"""Basic blocks to Python source: the emitter's core.

Each block becomes one function over whole lanes: registers come in as arrays, every PTX instruction becomes one or two
array expressions, and what is live afterwards goes back. There are no masks inside a block, since all of a group's
lanes execute it; a guarded instruction selects between its result and the old value.

A register has one storage dtype (unsigned, bool for predicates); inside a block the emitter keeps the views of a value
that instructions asked for (uint32, int32, float32 of the same bits), each made once. Instructions register themselves
in `EMITTERS` from the emit_*.py modules; one that finds a form it does not know raises UnsupportedPtx with its text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .errors import UnsupportedPtx
from .flow import Block, destinations, exit_sources, sources
from .lowering import LoweredKernel
from .syntax import (
    TYPE_BITS,
    Immediate,
    Instruction,
    Negated,
    Operand,
    Register,
    Sink,
    Special,
    SymbolReference,
)

# How a PTX type's values look to NumPy. bf16 and the packed types stay bits.
DTYPES: Final = {
    **{f"{letter}{bits}": f"u{bits // 8}" for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    "f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4", "tf32": "u4",
    "u16x2": "u4", "s16x2": "u4", "e4m3": "u1", "e5m2": "u1", "e4m3x2": "u2", "e5m2x2": "u2", "pred": "b1",
}  # fmt: skip

INTEGER: Final = frozenset(f"{letter}{bits}" for letter in "us" for bits in (8, 16, 32, 64))

Emitter = Callable[["BlockEmitter", Instruction], None]
EMITTERS: Final[dict[str, Emitter]] = {}


def emits(*opcodes: str) -> Callable[[Emitter], Emitter]:
    """Register the function that emits these opcodes."""

    def register(emitter: Emitter) -> Emitter:
        for opcode in opcodes:
            EMITTERS[opcode] = emitter
        return emitter

    return register


def constant_bits(value: Immediate, kind: str) -> npt.NDArray[Any]:
    """A literal as an array of one element of the kind's dtype."""
    dtype = np.dtype(DTYPES[kind])
    if value.bits:
        raw = int(value.value)
        if kind == "f32" and value.bits == 64:
            return np.array([raw], dtype=np.uint64).view(np.float64).astype(np.float32)
        if kind == "f64" and value.bits == 32:
            return np.array([raw], dtype=np.uint32).view(np.float32).astype(np.float64)
        return np.array([raw & ((1 << 8 * dtype.itemsize) - 1)], dtype=f"u{dtype.itemsize}").view(dtype)
    if dtype.kind == "f":
        return np.array([value.value], dtype=dtype)
    if dtype.kind == "b":
        return np.array([bool(value.value)])
    if isinstance(value.value, float):
        if kind in ("b32", "b64"):
            raw_float = np.array([value.value], dtype=f"f{dtype.itemsize}")
            return raw_float.view(dtype)
        raise ValueError(f"{value.value} is not a .{kind}")
    raw = value.value & ((1 << 8 * dtype.itemsize) - 1)
    return np.array([raw], dtype=f"u{dtype.itemsize}").view(dtype)


class KernelEmitter:
    """What the blocks of one kernel share: the constants and the namespace of the generated code."""

    def __init__(self, kernel: LoweredKernel, namespace: dict[str, Any]) -> None:
        self.kernel = kernel
        self.namespace = namespace
        self._constants: dict[tuple[str, bytes], str] = {}
        self._counter = 0

    def constant(self, array: npt.NDArray[Any]) -> str:
        key = (array.dtype.str, array.tobytes())
        name = self._constants.get(key)
        if name is None:
            name = self._constants[key] = f"k{len(self._constants)}"
            array.flags.writeable = False
            self.namespace[name] = array
        return name

    def fresh(self) -> str:
        self._counter += 1
        return f"v{self._counter}"


class BlockEmitter:
    """Emits one block."""

    def __init__(self, owner: KernelEmitter, block: Block) -> None:
        self.owner = owner
        self.kernel = owner.kernel
        self.block = block
        self.lines: list[str] = []
        self.carry: str | None = None  # the condition code of add.cc and kin, as a 0/1 variable
        self.carry_dtype = "u4"
        self.guard: str | None = None
        self.instruction: Instruction | None = None
        self._values: dict[Register, dict[str, str]] = {}
        self._specials: dict[str, str] = {}
        self._written: set[Register] = set()

    # --- for emitters -----------------------------------------------------------------------------------------------

    def unsupported(self, reason: str = "") -> UnsupportedPtx:
        instruction = self.instruction
        assert instruction is not None
        return UnsupportedPtx(instruction.name, instruction.line, reason)

    def line(self, text: str) -> None:
        self.lines.append(text)

    def let(self, expression: str) -> str:
        """A new variable."""
        name = self.owner.fresh()
        self.lines.append(f"{name} = {expression}")
        return name

    def constant(self, value: float, kind: str) -> str:
        return self.owner.constant(constant_bits(Immediate(value), kind))

    def value(self, operand: Operand, kind: str) -> str:
        """A variable that holds the operand as the kind's dtype. A wider register is truncated to the kind's bits."""
        wanted = DTYPES[kind]
        if isinstance(operand, Register):
            return self._register(operand, wanted, TYPE_BITS[kind])
        if isinstance(operand, Immediate):
            try:
                return self.owner.constant(constant_bits(operand, kind))
            except ValueError as error:
                raise self.unsupported(str(error)) from None
        if isinstance(operand, Negated):
            return self.let(f"~{self._register(operand.register, 'b1', 1)}")
        if isinstance(operand, Special):
            name = self._specials.get(operand.name)
            if name is None:
                name = self.let(f"C.special(G, {operand.name!r})")
                if "clock" not in operand.name and "timer" not in operand.name:
                    self._specials[operand.name] = name
            if wanted == "u4":
                return name
            if wanted[1] == "4":
                return self.let(f"{name}.view({wanted})")
            return self.let(f"{name}.astype({wanted})")
        if isinstance(operand, SymbolReference):
            return self.symbol(operand, wanted)
        raise self.unsupported("an operand of this form")

    def symbol(self, operand: SymbolReference, dtype: str) -> str:
        """The address of a variable in its own state space, as an integer of that dtype."""
        variable = operand.variable
        if variable is not None and variable in self.kernel.local_offsets:
            offset = self.kernel.local_offsets[variable]
        elif variable is not None and variable in self.kernel.parameter_offsets:
            offset = self.kernel.parameter_offsets[variable]
        elif operand.name in self.kernel.shared_offsets:
            offset = self.kernel.shared_offsets[operand.name]
        elif operand.name not in self.kernel.symbols:
            raise self.unsupported(f"{operand.name} is not defined in this module")
        else:
            address = f"C.symbols[{operand.name!r}]"
            if operand.offset:
                address += f" + {self.owner.constant(np.array([operand.offset & (2**64 - 1)], np.uint64))}"
            return self.let(address if dtype == "u8" else f"({address}).astype({dtype})")
        return self.owner.constant(np.array([offset + operand.offset], dtype=dtype))

    def _register(self, register: Register, wanted: str, bits: int) -> str:
        known = self._values.get(register)
        if known is None:
            canonical = self.canonical(register)
            name = self.let(f"R[{register.number}]")
            known = self._values[register] = {canonical: name}
        found = known.get(wanted)
        if found is not None:
            return found
        have, first = next(iter(known.items()))
        if wanted == "b1" or have == "b1":
            raise self.unsupported(f"{register.name} used as .pred and otherwise")
        if have[1] == wanted[1]:
            known[wanted] = found = self.let(f"{first}.view({wanted})")
            return found
        if register.bits < bits:
            raise self.unsupported(f"{register.name} is narrower than the instruction")
        raw = self._register(register, self.canonical(register), register.bits)
        unsigned = f"u{wanted[1]}"
        truncated = known.get(f"{unsigned} part")
        if truncated is None:
            truncated = self.let(f"{raw}.astype({unsigned})")
        return truncated if unsigned == wanted else self.let(f"{truncated}.view({wanted})")

    @staticmethod
    def canonical(register: Register) -> str:
        return "b1" if register.type == "pred" else f"u{register.bits // 8}"

    def define(self, destination: Operand, expression: str, kind: str) -> None:
        """The destination register gets the expression, an array of the kind's dtype; narrower ones are extended."""
        if isinstance(destination, Sink):
            self.line(expression)
            return
        if not isinstance(destination, Register):
            raise self.unsupported("a destination that is not a register")
        dtype = DTYPES[kind]
        canonical = self.canonical(destination)
        if (dtype == "b1") != (canonical == "b1"):
            raise self.unsupported(f"{destination.name} does not hold a .{kind}")
        if dtype[1] != canonical[1]:
            if dtype[1] > canonical[1]:
                raise self.unsupported(f"{destination.name} is narrower than .{kind}")
            if dtype[0] == "i":
                signed = f"i{canonical[1]}"
                expression, dtype = f"({expression}).astype({signed})", signed
            else:
                if dtype[0] == "f":
                    expression = f"({expression}).view(u{dtype[1]})"
                expression, dtype = f"({expression}).astype({canonical})", canonical
        if self.guard is not None:
            old = self._register(destination, dtype, destination.bits)
            expression = f"where({self.guard}, {expression}, {old})"
        self._values[destination] = {dtype: self.let(expression)}
        self._written.add(destination)

    def assign(self, destination: Operand, variable: str, kind: str) -> None:
        """Like `define` for a result that needs no guard (it has been merged already)."""
        guard, self.guard = self.guard, None
        self.define(destination, variable, kind)
        self.guard = guard

    # --- the whole block --------------------------------------------------------------------------------------------

    def run(self) -> str:
        """The source of `def b<number>(C, G, R, n)`. What it returns depends on the block's exit."""
        for instruction in self.block.body:
            self.instruction = instruction
            emitter = EMITTERS.get(instruction.opcode)
            if emitter is None:
                raise UnsupportedPtx(instruction.name, instruction.line)
            self.guard = None
            if instruction.guard is not None:
                guard = self._register(instruction.guard, "b1", 1)
                self.guard = self.let(f"~{guard}") if instruction.guard_negated else guard
            try:
                emitter(self, instruction)
            except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
                # Emitters take an instruction apart as if it were well formed; what is not ends here.
                raise self.unsupported(f"malformed: {error}") from error
        self.guard = None
        try:
            result = self._exit()
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            raise self.unsupported(f"malformed: {error}") from error
        for register in sorted(self._written & self.block.live_out, key=lambda r: r.number):
            self.line(
                f"R[{register.number}] = {self._register(register, self.canonical(register), register.bits)}"
            )
        for register in sorted(self.block.live_in - self.block.live_out, key=lambda r: r.number):
            self.line(f"R[{register.number}] = None")
        if result is not None:
            self.line(f"return {result}")
        return "\n    ".join([f"def b{self.block.number}(C, G, R, n):", *self._released(), "pass"])

    def _exit(self) -> str | None:
        leave = self.block.exit
        self.instruction = leave.instruction
        if leave.kind == "branch":
            assert leave.predicate is not None
            predicate = self._register(leave.predicate, "b1", 1)
            return f"~{predicate}" if leave.negated else predicate
        if leave.kind == "switch":
            assert leave.instruction is not None
            return self.value(leave.instruction.operands[0], "u32")
        if leave.kind == "barrier":
            assert leave.instruction is not None
            return self._barrier(leave.instruction)
        return None

    def _barrier(self, instruction: Instruction) -> str:
        """(barrier number, thread count or None, predicate or None)."""
        modifiers = [m for m in instruction.modifiers if m not in ("cta", "aligned")]
        operands = list(instruction.operands)
        if modifiers[:1] == ["red"]:
            operands.pop(0)
            predicate = self.value(operands.pop(), "pred")
        elif modifiers in (["sync"], ["arrive"]):
            predicate = "None"
        else:
            raise self.unsupported()
        number = self.value(operands[0], "u32") if operands else self.constant(0, "u32")
        count = self.value(operands[1], "u32") if len(operands) > 1 else "None"
        return f"({number}, {count}, {predicate})"

    def _released(self) -> list[str]:
        """The lines, with every variable dropped after its last use: large arrays are recycled while still in cache."""
        seen: set[str] = set()
        out: list[str] = []
        for line in reversed(self.lines):
            names = [name for name in dict.fromkeys(_VARIABLE.findall(line)) if name not in seen]
            seen.update(names)
            if names and not line.startswith("return"):
                out.append(f"del {', '.join(names)}")
            out.append(line)
        out.reverse()
        return out


_VARIABLE: Final = re.compile(r"\bv\d+\b")


def result_is_wanted(emitter: BlockEmitter, instruction: Instruction) -> bool:
    """Whether anything may read the instruction's destination (used where not computing it is much cheaper)."""
    wanted = set(destinations(instruction))
    if not wanted:
        return False
    position = next(i for i, other in enumerate(emitter.block.body) if other is instruction)
    for later in emitter.block.body[position + 1 :]:
        if wanted & set(sources(later)):
            return True
        if later.guard is None:
            wanted -= set(destinations(later))
    return bool(wanted & set(exit_sources(emitter.block.exit)) or wanted & emitter.block.live_out)


def type_of(e: BlockEmitter, i: Instruction) -> str:
    """The instruction's last modifier, which must be a type."""
    kind = i.modifiers[-1] if i.modifiers else ""
    if kind not in DTYPES:
        raise e.unsupported()
    return kind
