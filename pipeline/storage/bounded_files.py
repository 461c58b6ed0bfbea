"""Read what others wrote: files, JSON and YAML of bounded size, depth and count.

Each function raises OSError if a file cannot be read, and ValueError with the reason in words if its content is not
what it should be; never RecursionError or MemoryError.
"""

import errno
import json
import os
import re
import stat
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import Resolver
from yaml.scanner import Scanner

try:
    from yaml.cyaml import CParser
except ImportError:  # PyYAML without libyaml, which is ten times as fast
    CParser = None

MOST_BYTES = 32 << 20  # the side-car of 4 TB of images
MOST_YAML_BYTES = 4 << 20
MOST_YAML_NODES = 100_000  # the classes of ImageNet-22K in each stage; what aliases repeat counts each time
MOST_DEPTH = 64
_MOST_CHARACTERS_OF_A_NUMBER = 400


def read_file(path: str | os.PathLike, most_bytes: int | None = MOST_BYTES, start: int = 0) -> bytes:
    """Read a whole regular file: no pipe, for whose writer it would wait, and no endless device.

    most_bytes: a longer file is refused; None reads any, from the byte `start`.
    """
    # Without O_NONBLOCK opening a pipe waits for somebody who writes into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
            raise OSError(number, "it is a folder" if number == errno.EISDIR else "it is no regular file", str(path))
        if most_bytes is None:
            file.seek(start)
            return file.read()
        data = b"" if status.st_size > most_bytes else file.read(most_bytes + 1)
        if max(status.st_size, len(data)) > most_bytes:
            raise ValueError(f"it holds more than {most_bytes >> 20} MiB, the most that is read")
        return data


def read_text(path: str | os.PathLike, most_bytes: int = MOST_BYTES) -> str:
    """Read a text file in UTF-8."""
    return read_file(path, most_bytes).decode()


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file."""
    return parse_json(read_file(path))


def read_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file, see `parse_yaml`."""
    return parse_yaml(read_text(path, MOST_YAML_BYTES))


def parse_json(text: bytes | str) -> Any:
    """Parse JSON. Numbers beyond the range of floats become infinite, as NaN stays NaN: the caller checks ranges."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    opening = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(map(text.count, opening)) > MOST_DEPTH:
        _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [
        item
        for inner in level
        if isinstance(inner, dict | list)
        for item in (inner.values() if isinstance(inner, dict) else inner)
        if isinstance(item, dict | list)
    ]:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(_TOO_DEEP)


_TOO_DEEP = f"it is nested more than {MOST_DEPTH} deep"


def parse_yaml(text: str) -> Any:
    """Parse one YAML document of plain values.

    1e-3 is a number and 2026-11-29 is text, unlike in YAML 1.1. A key may occur once in a mapping. An alias must not
    contain itself.
    """
    try:
        loader = _BoundedLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        place = f" on line {error.problem_mark.line + 1}" if error.problem_mark else ""
        expected = f"{error.context} " if str(error.problem).startswith("but ") else ""
        raise ValueError(f"{expected}{error.problem or error.context}{place}") from None
    except Exception as error:  # explicit tags such as !!bool or !!timestamp raise anything
        raise ValueError(f"a value is not what its tag says ({type(error).__name__}: {str(error)[:100]})") from None


def yaml_text(value: Any) -> str:
    """Write plain values as YAML that `parse_yaml` reads back unchanged."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


# As YAML 1.2 and OmegaConf: 1e-3 is a number.
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
    |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?|[-+]?[0-9]+(?:_[0-9]+)*(?::[0-5]?[0-9])+\.[0-9_]*
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.X,
)
_FLOAT_TAG = "tag:yaml.org,2002:float"


class _Events(*((CParser,) if CParser else (Reader, Scanner, Parser))):
    """The events of a YAML document, by libyaml where PyYAML has it."""

    def __init__(self, text: str) -> None:
        if CParser:
            CParser.__init__(self, text)
        else:
            Reader.__init__(self, text)
            Scanner.__init__(self)
            Parser.__init__(self)


class _BoundedLoader(Composer, _Events, SafeConstructor, Resolver):
    """Builds values from events, and gives up where a document is too deep, too large or contains itself."""

    def __init__(self, text: str) -> None:
        _Events.__init__(self, text)
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}  # nodes below each finished node, by its id

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        is_alias = isinstance(event, yaml.AliasEvent)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=event.start_mark)
        before = self._nodes
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias contains itself", problem_mark=event.start_mark)
        self._nodes += self._sizes[id(node)] if is_alias else 1
        if self._nodes > MOST_YAML_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"it holds more than {MOST_YAML_NODES:,} values, aliases counted out,",
                problem_mark=event.start_mark,
            )
        if not is_alias:
            self._sizes[id(node)] = self._nodes - before
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} occurs twice", problem_mark=key.start_mark)
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key)
        return node

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        number = node.tag in (_FLOAT_TAG, "tag:yaml.org,2002:int")
        if number and len(node.value) > _MOST_CHARACTERS_OF_A_NUMBER:
            raise yaml.MarkedYAMLError(
                problem=f"a number of {len(node.value):,} characters", problem_mark=node.start_mark
            )
        return super().construct_scalar(node)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `_BoundedLoader` would read as numbers."""


for _kind in (_BoundedLoader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+0123456789."))
_BoundedLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _BoundedLoader.yaml_implicit_resolvers.items()
}
