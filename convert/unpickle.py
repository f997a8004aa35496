"""Torch's .pt files, read without running anything that they say.

A pickle is a program. Python's own machine imports what it names and calls it; the one below knows data alone. Of the
globals that a program names, a few stand for functions of this file (MAKERS), some for classes, of which only what they
were made of is kept (INERT), some are mere names (NAMES). Everything else is refused by name, and nothing is ever
imported, called, or looked up in a module.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convert.archive import Refusal, Source, read_with
from pretrain.checkpoint import CheckpointError

DEEPEST = 200  # containers in containers
LARGEST = 1 << 48  # of a size, stride, offset or count
DTYPES = {
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Double": torch.float64,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
DAMAGE = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError)

# Classes whose instances are kept as what they were made of: configurations, their nodes, enumerations, meters.
INERT = re.compile(
    r"argparse\.Namespace"
    r"|omegaconf\.(dictconfig\.DictConfig|listconfig\.ListConfig|base\.(Container)?Metadata)"
    r"|omegaconf\.nodes\.(Any|String|Integer|Float|Boolean|Enum|Bytes|Path|Interpolation(Result)?)Node"
    r"|fairseq\.data\.dictionary\.Dictionary"
    r"|fairseq\.dataclass\.(configs|constants|utils)\.\w+"
    r"|fairseq\.(models|modules|tasks|optim|criterions|data|ema)\.[\w.]*(Config|Choices|Enum)"
    r"|fairseq\.(logging\.)?meters\.\w+Meter"
    r"|(fairseq\.)?examples\.data2vec\.[\w.]*(Config|Modality|PredictionMode)"
    r"|hydra\.(types|conf|core\.\w+)\.\w+(Conf|Context|Mode)"
    r"|numpy\.dtype"
)
# What is only ever mentioned: types of values and of storages.
NAMES = re.compile(
    r"typing\.\w+"
    r"|builtins\.(object|dict|list|tuple|int|float|str|bool|bytes)"
    rf"|torch\.({'|'.join(DTYPES)})Storage"
    r"|torch\.(float16|float32|float64|bfloat16|int8|int16|int32|int64|uint8|bool|half|float|double|long)"
)
# As Python 2, whose names pickles below protocol 3 use, and older libraries called them.
RENAMED = (
    ("__builtin__.long", "builtins.int"),
    ("__builtin__.unicode", "builtins.str"),
    ("__builtin__.", "builtins."),
    ("numpy.core.", "numpy._core."),
    ("_operator.", "operator."),
)


@dataclass(eq=False)
class Named:
    """A global that is mentioned."""

    name: str


@dataclass(eq=False)
class Inert:
    """What would have been an instance: its class's name, what it was made of, the state it was given."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None


def read(path: str | Path, verify: bool = True) -> Any:
    """What a .pt file holds as dicts, lists, tuples, sets, texts, numbers and tensors, which are views of the file.
    Namespaces and configurations become dicts of their values, enumerations their values, other classes' names texts.

    With `verify` all checksums are looked at, which reads the whole file; without, only what is asked for is read.
    Raises CheckpointError, in one line, naming what is refused or where the file is damaged.
    """
    path = Path(path).expanduser()
    try:
        return plain(read_with(path, lambda stream, source: Machine(stream, source).run(), verify))
    except Refusal as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    except DAMAGE as error:
        told = " ".join(str(error).split())[:100] or type(error).__name__
        raise CheckpointError(f"cannot read {path}: its pickle is damaged ({told})") from None


class Machine:
    """The stack machine of one pickle. Raises Refusal for what it does not admit, DAMAGE for nonsense."""

    def __init__(self, stream: io.BytesIO, source: Source) -> None:
        self.stream, self.source = stream, source
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below open marks
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self.stream):
            if opcode.name in LITERALS:
                self.stack.append(argument)
            elif opcode.name in OPERATIONS:
                OPERATIONS[opcode.name](self, argument)
            elif opcode.name not in ("PROTO", "FRAME", "STOP"):
                raise Refusal(f"refused: the operation {opcode.name} in its pickle")
        (value,) = self.stack
        return value

    def to_mark(self) -> list[Any]:
        """What lies above the last mark, taken from the stack."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def gather(self, make: Callable[[list[Any]], Any]) -> None:
        items = self.to_mark()
        self.stack.append(make(items))

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def take(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError("the stack is empty")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Refusal(f"refused: items of {shown(target)}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise Refusal(f"refused: items of {shown(target)}")
        target.update(_pairs(items))

    def add(self, _: Any) -> None:
        items = self.to_mark()
        target = self.stack[-1]
        if type(target) is not set:
            raise Refusal(f"refused: elements of {shown(target)}")
        target.update(map(_key, items))

    def put(self, place: Any) -> None:
        self.memo[len(self.memo) if place is None else int(place)] = self.stack[-1]

    def get(self, place: Any) -> None:
        self.stack.append(self.memo[int(place)])

    def name(self, argument: str | None) -> None:
        """GLOBAL has module and name in one text, STACK_GLOBAL has both on the stack."""
        module, name = argument.rsplit(" ", 1) if argument is not None else self.take(2)
        if type(module) is not str or type(name) is not str:
            raise Refusal("refused: a global whose name is no text")
        full = f"{module}.{name}"
        for old, new in RENAMED:
            if full.startswith(old):
                full = new + full.removeprefix(old)
                break
        if full not in MAKERS and not INERT.fullmatch(full) and not NAMES.fullmatch(full):
            raise Refusal(f"refused: {_printable(f'{module}.{name}')} in its pickle; nothing was run")
        self.stack.append(Named(full))

    def reduce(self, _: Any) -> None:
        callee, args = self.take(2)
        if type(callee) is not Named or type(args) is not tuple:
            raise Refusal(f"refused: a call of {shown(callee)} in its pickle; nothing was run")
        if maker := MAKERS.get(callee.name):
            self.stack.append(maker(self, *args))
        else:
            self._instance(callee, args)

    def new(self, _: Any) -> None:
        callee, args = self.take(2)
        self._instance(callee, args)

    def _instance(self, callee: Any, args: Any) -> None:
        if type(callee) is not Named or not INERT.fullmatch(callee.name) or type(args) is not tuple:
            raise Refusal(f"refused: a call of {shown(callee)} in its pickle; nothing was run")
        self.stack.append(Inert(callee.name, args))

    def build(self, _: Any) -> None:
        (state,) = self.take(1)
        target = self.stack[-1]
        if type(target) is Inert and target.state is None and type(state) in (dict, tuple):
            target.state = state
        elif type(target) is not dict or type(state) is not dict:  # an OrderedDict's attributes are not kept
            raise Refusal(f"refused: a state for {shown(target)}")

    def persistent(self, _: Any) -> None:
        (identity,) = self.take(1)
        if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
            raise Refusal(f"refused: a persistent id that is no storage's ({shown(identity)})")
        _, kind, key, _, count, *view = identity
        if type(kind) is not Named or not kind.name.endswith("Storage") or type(key) is not str or any(view):
            raise Refusal(f"refused: a persistent id of a strange storage ({shown(kind)})")
        dtype = DTYPES[kind.name.removeprefix("torch.").removesuffix("Storage")]
        self.stack.append(self.source.storage(key, dtype, _count(count)))

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
        """A view of a storage, all of whose elements lie in it. What follows are gradients and hooks, not kept."""
        if type(storage) is not Tensor or type(size) is not tuple or type(stride) is not tuple:
            raise Refusal("refused: a tensor of something that is no storage")
        sizes, strides, first = [_count(n) for n in size], [_count(n) for n in stride], _count(offset)
        last = first + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        elements = math.prod(sizes)
        if len(sizes) > 16 or (elements and last >= storage.numel()) or max(elements, first) > storage.numel():
            raise Refusal(
                f"refused: a tensor of size {sizes[:16]}, strides {strides[:16]} and offset {first} leaves its storage "
                f"of {storage.numel()} elements"
            )
        return storage.as_strided(sizes, strides, first)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < LARGEST:
        raise Refusal("refused: a size, stride or offset that is negative, absurd or no number")
    return value


def _key(value: Any) -> Any:
    """Nested tuples are refused: to hash one that shares its parts can take for ever."""
    flat = value if type(value) is tuple else (value,)
    if any(type(part) not in (str, int, float, bool, bytes, type(None)) for part in flat):
        raise Refusal(f"refused: {shown(value)} as a key")
    return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise ValueError("a key without a value")
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _ordered(_: Machine, pairs: Any = ()) -> dict[Any, Any]:
    return _pairs([part for pair in pairs for part in (pair[0], pair[1])])


def _empty(_: Machine, factory: Any = None) -> dict[Any, Any]:
    return {}


def _set(_: Machine, items: Any = ()) -> set[Any]:
    return {_key(item) for item in items}


def _encode(_: Machine, text: str, encoding: str = "latin1") -> bytes:
    """How protocol 2 writes bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refusal(f"refused: a call of _codecs.encode with the encoding {shown(encoding)}")
    return text.encode("latin-1")


def _number(_: Machine, kind: Any, content: Any) -> int | float | bool:
    """A NumPy scalar."""
    if type(kind) is not Inert or kind.name != "numpy.dtype" or type(content) is not bytes:
        raise Refusal("refused: a NumPy scalar of no type")
    code, order = kind.args[0], (kind.state or (3, "|"))[1]
    if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1") or order not in "<|=":
        raise Refusal(f"refused: a NumPy scalar of type {shown(code)}")
    return np.frombuffer(content, np.dtype(code), 1)[0].item()


def _subscript(_: Machine, of: Any, by: Any) -> Named:
    """Types such as List[int]."""
    if type(of) is not Named:
        raise Refusal(f"refused: a call of operator.getitem on {shown(of)}")
    return of


MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _empty,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "_codecs.encode": _encode,
    "numpy._core.multiarray.scalar": _number,
    "operator.getitem": _subscript,
    "torch.Size": lambda _, sizes: tuple(map(_count, sizes)),
    "torch.device": lambda _, kind, number=None: str(kind),
    "torch._utils._rebuild_tensor": Machine.tensor,
    "torch._utils._rebuild_tensor_v2": Machine.tensor,
    "torch._utils._rebuild_parameter": lambda _, data, *rest: data,
}

LITERALS = {
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


def _pushes(make: Callable[[Machine], Any]) -> Callable[[Machine, Any], None]:
    return lambda machine, _: machine.stack.append(make(machine))


OPERATIONS: dict[str, Callable[[Machine, Any], Any]] = {
    "NONE": _pushes(lambda m: None),
    "NEWTRUE": _pushes(lambda m: True),
    "NEWFALSE": _pushes(lambda m: False),
    "EMPTY_LIST": _pushes(lambda m: []),
    "EMPTY_DICT": _pushes(lambda m: {}),
    "EMPTY_TUPLE": _pushes(lambda m: ()),
    "EMPTY_SET": _pushes(lambda m: set()),
    "TUPLE1": _pushes(lambda m: tuple(m.take(1))),
    "TUPLE2": _pushes(lambda m: tuple(m.take(2))),
    "TUPLE3": _pushes(lambda m: tuple(m.take(3))),
    "MARK": Machine.mark,
    "TUPLE": lambda m, _: m.gather(tuple),
    "LIST": lambda m, _: m.gather(list),
    "DICT": lambda m, _: m.gather(_pairs),
    "FROZENSET": lambda m, _: m.gather(lambda items: set(map(_key, items))),
    "POP": lambda m, _: m.take(1) if m.stack else m.to_mark(),
    "POP_MARK": lambda m, _: m.to_mark(),
    "DUP": _pushes(lambda m: m.stack[-1]),
    "APPEND": lambda m, _: m.extend(m.take(1)),
    "APPENDS": lambda m, _: m.extend(m.to_mark()),
    "SETITEM": lambda m, _: m.set_items(m.take(2)),
    "SETITEMS": lambda m, _: m.set_items(m.to_mark()),
    "ADDITEMS": Machine.add,
    "PUT": Machine.put,
    "BINPUT": Machine.put,
    "LONG_BINPUT": Machine.put,
    "MEMOIZE": Machine.put,
    "GET": Machine.get,
    "BINGET": Machine.get,
    "LONG_BINGET": Machine.get,
    "GLOBAL": Machine.name,
    "STACK_GLOBAL": Machine.name,
    "REDUCE": Machine.reduce,
    "NEWOBJ": Machine.new,
    "BUILD": Machine.build,
    "BINPERSID": Machine.persistent,
}


def plain(value: Any) -> Any:
    """`value` without stand-ins. What is shared stays shared. Raises Refusal for what holds itself or has no bottom."""
    made: dict[int, Any] = {}
    open_now: set[int] = set()

    def walk(value: Any) -> Any:
        if type(value) is Named:
            return value.name
        if type(value) not in (dict, list, tuple, Inert):
            return value
        if id(value) in made:
            return made[id(value)]
        if id(value) in open_now or len(open_now) > DEEPEST:
            raise Refusal(f"refused: containers that hold themselves, or are nested over {DEEPEST} deep")
        open_now.add(id(value))
        if type(value) is dict:
            new: Any = {key: walk(item) for key, item in value.items()}
        elif type(value) is Inert:
            new = walk(_content(value))
        else:
            new = type(value)(walk(item) for item in value)
        open_now.remove(id(value))
        made[id(value)] = new
        return new

    return walk(value)


def _content(instance: Inert) -> Any:
    """What matters of it: a configuration's values, an enumeration's value."""
    state = instance.state
    if isinstance(state, dict):
        held = next(
            (key for key in ("_content", "_val") if instance.name.startswith("omegaconf.") and key in state), None
        )
        return state[held] if held else state
    return instance.args[0] if len(instance.args) == 1 else instance.args


def shown(value: Any) -> str:
    """A value in an error's line: of a name its name, of a text its beginning, of others their kind."""
    first = value[0] if type(value) is tuple and value else value
    name = first.name if type(first) in (Named, Inert) else first if type(first) is str else type(first).__name__
    return _printable(name if first is value else f"({name}, ...)")


def _printable(name: str) -> str:
    return name.encode("unicode_escape").decode()[:100]
