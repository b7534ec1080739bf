"""PTX to C++ for ptx_machine.h: one function per entry, one statement per instruction.

Every statement carries a #line directive, so that compiler messages, sanitizer reports, aborts and
coverage name the line of the PTX. An instruction, modifier or operand that is not known here is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ptx_text import Entry, UnsupportedPtx, operands, parse, vector

C_TYPES = {
    "pred": "bool",
    "b8": "u8",
    "u8": "u8",
    "s8": "s8",
    "b16": "u16",
    "u16": "u16",
    "s16": "s16",
    "b32": "u32",
    "u32": "u32",
    "s32": "s32",
    "b64": "u64",
    "u64": "u64",
    "s64": "s64",
    "f32": "float",
}
BYTES = {"u8": 1, "s8": 1, "u16": 2, "s16": 2, "u32": 4, "s32": 4, "float": 4, "u64": 8, "s64": 8}
SPECIAL_REGISTERS = {
    "%tid.x": "current->thread.x",
    "%ctaid.x": "block.index.x",
    "%ctaid.y": "block.index.y",
    "%ctaid.z": "block.index.z",
    "%ntid.x": "emulation::block_dim.x",
    "%nctaid.x": "emulation::grid_dim.x",
    "%nctaid.y": "emulation::grid_dim.y",
    "%nctaid.z": "emulation::grid_dim.z",
    "%laneid": "(u32)current->lane",
}
# What a register holds before it is written.
POISON = {
    "bool": "false",
    "u16": "0xa5a5",
    "u32": "0xa5a5a5a5u",
    "u64": "0xa5a5a5a5a5a5a5a5ull",
    "float": "NAN",
}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED_COMPARISONS = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
OPERATORS = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}
FLOAT_FUNCTIONS = {
    *("add", "sub", "mul", "div", "fma", "rcp", "max", "min", "neg", "abs"),
    *("ex2", "lg2", "rsqrt"),
}
APPROXIMATE = {"ex2", "lg2", "rsqrt"}


@dataclass(frozen=True)
class TranslatedEntry:
    """A C++ function, and what a launch of it must keep to."""

    expression: str
    function: str
    param_bytes: int
    max_threads: int
    code: str


def translate(ptx: str, names: dict[str, str]) -> list[TranslatedEntry]:
    """The entries that ``names`` (C++ name expression -> lowered name) asks for.

    Raises:
        UnsupportedPtx: something is not known; the message has line and text.
    """
    entries, shared = parse(ptx)
    by_name = {entry.name: entry for entry in entries}
    return [
        TranslatedEntry(
            expression,
            lowered,
            by_name[lowered].param_bytes,
            by_name[lowered].max_threads,
            _Function(by_name[lowered], shared).code(),
        )
        for expression, lowered in names.items()
    ]


def _unsigned(kind: str) -> str:
    return f"u{kind[1:]}"


class _Function:
    """Translates one entry."""

    def __init__(self, entry: Entry, shared: set[str]) -> None:
        self.entry, self.shared = entry, shared
        self.registers: dict[str, str] = {}  # PTX name -> C++ type
        self.line = 0

    def code(self) -> str:
        body: list[str] = []
        for number, statement in self.entry.statements:
            self.line = number
            try:
                code = self._statement(statement)
            except (UnsupportedPtx, KeyError, ValueError, IndexError) as error:
                raise UnsupportedPtx(
                    f"{self.entry.name}, line {number}: {statement}: {error!r}"
                ) from error
            if code:
                covered = code if code.endswith(":;") else f"COVER({number}) {code}"
                body.append(f"#line {number}\n  {covered}")
        declared = [
            f"  {kind} {_cpp(name)} = {POISON[kind]};" for name, kind in self.registers.items()
        ]
        last = self.entry.statements[-1][0]
        return "\n".join(
            [
                f"COVERAGE_OF({self.entry.name}, {last + 1})",
                f"static void {self.entry.name}(const unsigned char* params) {{",
                f"  USE_COVERAGE({self.entry.name})",
                *declared,
                *body,
                "}\n",
            ]
        )

    def _statement(self, text: str) -> str:
        if text.startswith(".reg"):
            return self._declare(text)
        if re.match(r"\.(pragma|loc)\s", text):
            return ""
        if text.startswith("."):
            raise UnsupportedPtx("directive")
        if text.endswith(":"):
            return f"{_cpp(text[:-1])}:;"
        guard = ""
        if text.startswith("@"):
            predicate, text = text.split(None, 1)
            guard = f"if ({self._predicate(predicate[1:])}) "
        opcode, _, rest = re.sub(r"\s+", " ", text).partition(" ")
        modifiers = opcode.split(".")
        handler = _HANDLERS[modifiers[0]]
        return f"{guard}{{ {handler(self, modifiers, operands(rest))} }}"

    def _declare(self, text: str) -> str:
        found = re.fullmatch(r"\.reg \.(\w+)\s+(%\w+?)(?:<(\d+)>)?", text)
        if found is None:
            raise UnsupportedPtx("register")
        kind, name, count = found.groups()
        for register in [f"{name}{i}" for i in range(int(count))] if count else [name]:
            self.registers[register] = C_TYPES[kind]
        return ""

    # ---- Operands
    def _predicate(self, operand: str) -> str:
        if re.fullmatch(r"-?\d+", operand):
            return "true" if int(operand) else "false"
        name = operand.removeprefix("!")
        if self.registers[name] != "bool":
            raise UnsupportedPtx(f"{name} is no predicate")
        return f"{'!' if operand.startswith('!') else ''}{_cpp(name)}"

    def _read(self, operand: str, kind: str) -> str:
        """The operand as a value of PTX type ``kind``; its register may have another."""
        want = C_TYPES[kind]
        if operand in self.registers:
            have, name = self.registers[operand], _cpp(operand)
            if have == want:
                return name
            if "float" in (have, want):
                return f"bits<{want}>({name})"
            return f"({want}){name}"
        if operand in SPECIAL_REGISTERS:
            return f"({want}){SPECIAL_REGISTERS[operand]}"
        if operand in self.shared:
            return f"({want})SHARED_BASE"
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            return f"bits<float>(0x{found[1]}u)" if want == "float" else f"({want})0x{found[1]}u"
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", operand):
            value = int(operand, 0)
            return f"({want}){value & (1 << 64) - 1}ull"
        raise UnsupportedPtx(f"operand {operand}")

    def _write(self, operand: str, kind: str, value: str) -> str:
        """``operand = value``, the value of PTX type ``kind``."""
        if operand == "_":
            return f"(void)({value});"
        have, given, name = self.registers[operand], C_TYPES[kind], _cpp(operand)
        if have == given or "float" not in (have, given):
            return f"{name} = ({have})({value});"
        return f"{name} = bits<{have}>(({given})({value}));"

    def _address(self, operand: str) -> str:
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:([+-])\s*(-?\d+))?\s*\]", operand)
        if found is None:
            raise UnsupportedPtx(f"address {operand}")
        base, sign, offset = found.groups()
        if base not in self.shared and base not in self.registers:
            raise UnsupportedPtx(f"base {base}")
        value = "(u64)SHARED_BASE" if base in self.shared else f"(u64){_cpp(base)}"
        return f"({value} {sign} (s64){offset})" if sign else value

    # ---- Control
    def ret(self, op: list[str], args: list[str]) -> str:
        _require(op == ["ret"])
        return "return;"

    def bra(self, op: list[str], args: list[str]) -> str:
        _require(op in (["bra"], ["bra", "uni"]))
        return f"goto {_cpp(args[0])};"

    def bar(self, op: list[str], args: list[str]) -> str:
        _require(op == ["bar", "sync"] and args == ["0"])
        return f"barrier({self.line});"

    # ---- Moves
    def mov(self, op: list[str], args: list[str]) -> str:
        kind = op[1]
        _require(len(op) == 2)
        if args[0].startswith("{"):
            _require(kind == "b32")
            low, high = vector(args[0])
            halves = ((low, "v"), (high, "v >> 16"))
            written = [self._write(n, "b16", v) for n, v in halves if n != "_"]
            return f"const u32 v = {self._read(args[1], 'u32')}; " + " ".join(written)
        if args[1].startswith("{"):
            _require(kind == "b32")
            low, high = (self._read(x, "u16") for x in vector(args[1]))
            return self._write(args[0], "u32", f"(u32){low} | (u32){high} << 16")
        if kind == "pred":
            return f"{_cpp(args[0])} = {self._predicate(args[1])};"
        return self._write(args[0], kind, self._read(args[1], kind))

    def selp(self, op: list[str], args: list[str]) -> str:
        _require(len(op) == 2)
        a, b = (self._read(x, op[1]) for x in args[1:3])
        return self._write(args[0], op[1], f"{self._predicate(args[3])} ? {a} : {b}")

    def load(self, op: list[str], args: list[str]) -> str:
        space, kind, count = _memory_form(op)
        c_type = C_TYPES[kind]
        names = vector(args[0]) if count > 1 else [args[0]]
        _require(len(names) == count)
        if space == "param":
            return self._load_param(names, kind, args[1])
        # Every element is read before a register is written: one of them may be the address.
        code = self._pointer(space, c_type, count, args[1], "loaded")
        code += " ".join(f"const {c_type} v{i} = at[{i}];" for i in range(count)) + " "
        return code + " ".join(self._write(n, kind, f"v{i}") for i, n in enumerate(names))

    def _load_param(self, names: list[str], kind: str, operand: str) -> str:
        found = re.fullmatch(r"\[\s*(\w+)\s*(?:\+\s*(\d+))?\s*\]", operand)
        _require(found is not None and found[1] == self.entry.param)
        assert found is not None
        offset, size, c_type = int(found[2] or 0), BYTES[C_TYPES[kind]], C_TYPES[kind]
        _require(offset % (size * len(names)) == 0)
        _require(offset + size * len(names) <= self.entry.param_bytes)
        return " ".join(
            self._write(name, kind, f"param<{c_type}>(params + {offset + i * size})")
            for i, name in enumerate(names)
        )

    def store(self, op: list[str], args: list[str]) -> str:
        space, kind, count = _memory_form(op)
        _require(space != "param")
        names = vector(args[1]) if count > 1 else [args[1]]
        _require(len(names) == count)
        code = self._pointer(space, C_TYPES[kind], count, args[0], "stored")
        return code + " ".join(f"at[{i}] = {self._read(n, kind)};" for i, n in enumerate(names))

    def _pointer(self, space: str, c_type: str, count: int, operand: str, counter: str) -> str:
        code = f"{c_type}* at = {space}_pointer<{c_type}>"
        code += f"({self._address(operand)}, {count}, {self.line}); "
        if space == "global" and count * BYTES[c_type] == 16 and c_type == "u32":
            code += f"emulation::count(&emulation::Counters::{counter}_bytes, 16); "
        return code

    def cvta(self, op: list[str], args: list[str]) -> str:
        value = self._read(args[1], "u64")
        match op[1:]:
            case ["to", "global", "u64"] | ["global", "u64"]:
                return self._write(args[0], "u64", value)
            case ["to", "shared", "u64"]:
                value = f"{value} - (u64)block.shared + SHARED_BASE"
                return self._write(args[0], "u64", value)
            case ["shared", "u64"]:
                value = f"{value} + (u64)block.shared - SHARED_BASE"
                return self._write(args[0], "u64", value)
        raise UnsupportedPtx("cvta")

    def cvt(self, op: list[str], args: list[str]) -> str:
        match op[1:]:
            case ["rn", ("bf16x2" | "f16x2") as to, "f32"]:
                a, b = (self._read(x, "f32") for x in args[1:])
                return self._write(args[0], "b32", f"pack_{to[:-2]}({a}, {b})")
            case ["f32", "f16"]:
                return self._write(args[0], "f32", f"of_f16({self._read(args[1], 'b16')})")
            case ["rn", "f32", ("s32" | "u32") as source]:
                return self._write(args[0], "f32", f"(float){self._read(args[1], source)}")
            case [to, source] if {to, source} <= set(BYTES):
                return self._write(args[0], to, f"({C_TYPES[to]}){self._read(args[1], source)}")
        raise UnsupportedPtx("cvt")

    # ---- Integers and predicates
    def arithmetic(self, op: list[str], args: list[str]) -> str:
        """add, sub, and, or, xor."""
        name, kind = op[0], op[-1]
        if kind == "f32":
            return self.float_function(op, args)
        _require(len(op) == 2)
        if kind == "pred":
            a, b = (self._predicate(x) for x in args[1:])
            return f"{_cpp(args[0])} = {a} {OPERATORS[name]} {b};"
        a, b = (self._read(x, _unsigned(kind)) for x in args[1:])
        return self._write(args[0], _unsigned(kind), f"{a} {OPERATORS[name]} {b}")

    def invert(self, op: list[str], args: list[str]) -> str:
        _require(len(op) == 2)
        if op[1] == "pred":
            return f"{_cpp(args[0])} = !{self._predicate(args[1])};"
        unsigned = _unsigned(op[1])
        return self._write(args[0], unsigned, f"~{self._read(args[1], unsigned)}")

    def neg(self, op: list[str], args: list[str]) -> str:
        if op[-1] == "f32":
            return self.float_function(op, args)
        _require(op[1:] in (["s32"], ["s64"]))
        unsigned = _unsigned(op[1])
        return self._write(args[0], unsigned, f"0 - {self._read(args[1], unsigned)}")

    def shift(self, op: list[str], args: list[str]) -> str:
        _require(len(op) == 2)
        kind = op[1].replace("b", "u")
        name = "shift_left" if op[0] == "shl" else "shift_right"
        a, n = self._read(args[1], kind), self._read(args[2], "u32")
        return self._write(args[0], kind, f"{name}<{C_TYPES[kind]}>({a}, {n})")

    def extreme(self, op: list[str], args: list[str]) -> str:
        """min, max."""
        if op[-1] == "f32":
            return self.float_function(op, args)
        _require(len(op) == 2 and op[1][0] in "us")
        a, b = (self._read(x, op[1]) for x in args[1:])
        return self._write(args[0], op[1], f"std::{op[0]}<{C_TYPES[op[1]]}>({a}, {b})")

    def multiply(self, op: list[str], args: list[str]) -> str:
        """mul, mad."""
        name, kind = op[0], op[-1]
        if kind == "f32":
            return self.float_function(op, args)
        _require(len(op) == 3 and op[1] in ("lo", "hi", "wide") and kind[0] in "us")
        if op[1] == "lo":
            # Of 16 bits, C++ would multiply as signed int, which may overflow.
            values = [f"(u64){self._read(x, _unsigned(kind))}" for x in args[1:]]
            product = f"{values[0]} * {values[1]}" + (f" + {values[2]}" if name == "mad" else "")
            return self._write(args[0], _unsigned(kind), product)
        bits = int(kind[1:])
        _require(bits <= 32)
        wide = f"{kind[0]}{2 * bits}"
        a, b = (f"({wide}){self._read(x, kind)}" for x in args[1:3])
        if op[1] == "hi":
            _require(name == "mul")
            return self._write(args[0], kind, f"({C_TYPES[kind]})(({a} * {b}) >> {bits})")
        added = f" + {self._read(args[3], wide)}" if name == "mad" else ""
        return self._write(args[0], wide, f"{a} * {b}{added}")

    def divide(self, op: list[str], args: list[str]) -> str:
        """div, rem."""
        if op[-1] == "f32":
            return self.float_function(op, args)
        _require(len(op) == 2 and op[1] in ("s32", "u32", "s64", "u64"))
        a, b = (self._read(x, op[1]) for x in args[1:])
        name = {"div": "divide", "rem": "remainder"}[op[0]]
        return self._write(args[0], op[1], f"{name}<{C_TYPES[op[1]]}>({a}, {b}, {self.line})")

    def bfi(self, op: list[str], args: list[str]) -> str:
        _require(op == ["bfi", "b32"])
        values = ", ".join(self._read(x, "u32") for x in args[1:])
        return self._write(args[0], "u32", f"bfi({values})")

    def prmt(self, op: list[str], args: list[str]) -> str:
        _require(op == ["prmt", "b32"])
        values = ", ".join(self._read(x, "u32") for x in args[1:])
        return self._write(args[0], "u32", f"prmt({values})")

    def setp(self, op: list[str], args: list[str]) -> str:
        kind, comparison = op[-1], op[1]
        _require(len(op) == 3 or op[2:-1] == ["ftz"])
        a, b = (self._read(x, kind) for x in args[1:])
        target = _cpp(args[0])
        if kind != "f32":
            operator = (UNSIGNED_COMPARISONS if kind[0] == "u" else {}) | COMPARISONS
            return f"{target} = {a} {operator[comparison]} {b};"
        a, b = (f"flush({x})" if "ftz" in op else x for x in (a, b))
        unordered = comparison.endswith("u")
        plain = comparison[:-1] if unordered else comparison
        # C++ compares a NaN as unequal to all; PTX's plain ne is false for it.
        test = "a < b || a > b" if comparison == "ne" else f"a {COMPARISONS[plain]} b"
        test = f"a != a || b != b || {test}" if unordered else test
        return f"const float a = {a}, b = {b}; {target} = {test};"

    # ---- Floats
    def float_function(self, op: list[str], args: list[str]) -> str:
        name = op[0]
        modifiers = set(op[1:-1])
        _require(op[-1] == "f32" and name in FLOAT_FUNCTIONS)
        _require("ftz" in modifiers and modifiers <= {"rn", "ftz", "approx"})
        _require(("approx" in modifiers) == (name in APPROXIMATE))
        values = ", ".join(self._read(x, "f32") for x in args[1:])
        return self._write(args[0], "f32", f"{name}_ftz({values})")

    # ---- Collectives and tensor cores
    def shfl(self, op: list[str], args: list[str]) -> str:
        _require(op == ["shfl", "sync", "bfly", "b32"])
        target, _, valid = args[0].partition("|")
        value, mask, clamp, members = (self._read(x, "u32") for x in args[1:])
        code = f"shuffle_bfly({value}, {mask}, {clamp}, {members}, {self.line})"
        return self._write(target, "u32", code) + (f" {_cpp(valid)} = true;" if valid else "")

    def vote(self, op: list[str], args: list[str]) -> str:
        _require(op == ["vote", "sync", "any", "pred"])
        source, members = self._predicate(args[1]), self._read(args[2], "u32")
        return f"{_cpp(args[0])} = vote_any({source}, {members}, {self.line});"

    def ldmatrix(self, op: list[str], args: list[str]) -> str:
        plain = ["ldmatrix", "sync", "aligned", "m8n8", "x4", "shared", "b16"]
        _require([x for x in op if x != "trans"] == plain)
        transposed = "true" if "trans" in op else "false"
        code = f"u32 d[4]; ldmatrix_x4<{transposed}>(d, {self._address(args[1])}, {self.line}); "
        names = vector(args[0])
        return code + " ".join(self._write(n, "b32", f"d[{i}]") for i, n in enumerate(names))

    def mma(self, op: list[str], args: list[str]) -> str:
        _require(op[:6] == ["mma", "sync", "aligned", "m16n8k16", "row", "col"])
        _require(op[6:] in (["f32", t, t, "f32"] for t in ("bf16", "f16")))
        d, a, b, c = (vector(x) for x in args)
        _require([len(x) for x in (d, a, b, c)] == [4, 4, 2, 4])
        code = f"const u32 a[4] = {{{', '.join(self._read(x, 'b32') for x in a)}}}; "
        code += f"const u32 b[2] = {{{', '.join(self._read(x, 'b32') for x in b)}}}; "
        code += f"const float c[4] = {{{', '.join(self._read(x, 'f32') for x in c)}}}; "
        code += f"float d[4]; mma<{'true' if op[7] == 'bf16' else 'false'}>"
        code += f"(d, a, b, c, {self.line}); "
        return code + " ".join(self._write(n, "f32", f"d[{i}]") for i, n in enumerate(d))

    def cp(self, op: list[str], args: list[str]) -> str:
        match op[1:]:
            case ["async", "cg", "shared", "global"] if args[2] == "16":
                size = self._read(args[3], "u32") if len(args) > 3 else "16u"
                to, source = (self._address(x) for x in args[:2])
                return f"cp_async16({to}, {source}, {size}, {self.line});"
            case ["async", "commit_group"]:
                return "cp_async_commit();"
            case ["async", "wait_group"]:
                return f"cp_async_wait({int(args[0])});"
        raise UnsupportedPtx("cp")


def _cpp(name: str) -> str:
    return name.replace("%", "_").replace("$", "_")


def _require(known: bool) -> None:
    if not known:
        raise UnsupportedPtx("form of the instruction")


def _memory_form(op: list[str]) -> tuple[str, str, int]:
    """(space, type, elements); a generic address lies in memory that host and device share."""
    spaces = [x for x in op[1:-1] if x in ("param", "global", "shared")]
    rest = [x for x in op[1:-1] if x not in ("param", "global", "shared")]
    _require(len(spaces) <= 1 and set(rest) <= {"v2", "v4", "nc"})
    count = 4 if "v4" in rest else 2 if "v2" in rest else 1
    return (spaces[0] if spaces else "global"), op[-1], count


_F = _Function
_HANDLERS: dict[str, Callable[[_Function, list[str], list[str]], str]] = {
    **dict.fromkeys(("add", "sub", "and", "or", "xor"), _F.arithmetic),
    **dict.fromkeys(("fma", "rcp", "abs", "ex2", "lg2", "rsqrt"), _F.float_function),
    **dict.fromkeys(("shl", "shr"), _F.shift),
    **dict.fromkeys(("min", "max"), _F.extreme),
    **dict.fromkeys(("mul", "mad"), _F.multiply),
    **dict.fromkeys(("div", "rem"), _F.divide),
    **{name: getattr(_F, name) for name in ("ret", "bra", "bar", "mov", "selp", "cvta", "cvt")},
    **{name: getattr(_F, name) for name in ("neg", "bfi", "prmt", "setp", "shfl", "vote", "mma")},
    **{"ld": _F.load, "st": _F.store, "not": _F.invert, "ldmatrix": _F.ldmatrix, "cp": _F.cp},
}
