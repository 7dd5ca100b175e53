"""YAML text to a `Spec`, or a `SpecError` that names line, field and remedy of everything that is wrong with it.

Of YAML only what a spec needs: one document, mappings with distinct text keys, lists, scalars, anchors
within reason. Tags, merge keys and several documents are refused. Untrusted text costs bounded time and memory.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import yaml
from pydantic import ValidationError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from agent.adapters.spec_remedies import remedy_for
from agent.domain.errors import SpecError
from agent.domain.specs import LogSpec, Spec
from trainer.config import UNKNOWN_PRESET

MAX_SPEC_BYTES = 256 << 10

_MAX_NODES = 5_000
"""As written, and again after expansion of aliases: a bomb of nested anchors ends here, a real spec has dozens."""
_MAX_DEPTH = 20
_SCORES = ("val_bpb", "val_loss", "train_loss")

Place = tuple[str | int, ...]
"""Where a value stands: keys and list indices from the root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    line: int
    field: str
    text: str
    remedy: str


class _RefusedError(Exception):
    """A YAML construct that cannot be used; `problem` says where and why."""

    def __init__(self, line: int, text: str, remedy: str, field: str = "") -> None:
        super().__init__(text)
        self.problem = _Problem(line=line, field=field, text=text, remedy=remedy)


class _Loader(yaml.SafeLoader):
    """Safe loading that also refuses explicit tags and depth, while composing, before anything is built."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave the parser untyped
        if getattr(event, "tag", None) is not None:
            raise _RefusedError(
                event.start_mark.line + 1, f"the YAML tag {event.tag} is not allowed", "write a plain value"
            )
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise _RefusedError(event.start_mark.line + 1, f"more than {_MAX_NODES} values", "no spec needs that many")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _RefusedError(event.start_mark.line + 1, f"nested more than {_MAX_DEPTH} deep", "no spec needs that")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


# YAML 1.1 takes 1e9 for text; people who write it mean a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+\Z"), list("-+0123456789")
)


def load_spec_text(path: Path) -> tuple[str, Spec]:
    """The text of a spec file, and the spec. Raises SpecError, also when the file cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_SPEC_BYTES + 1)
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", source=path, remedy="check the path") from error
    text = decode_spec(data, str(path))
    return text, parse_spec(text, str(path))


def load_spec(path: Path) -> Spec:
    """Read a spec file. Raises SpecError, also when the file cannot be read."""
    return load_spec_text(path)[1]


def decode_spec(data: bytes, source: str) -> str:
    """The text of a spec file. A byte-order mark is honoured. Raises SpecError on other encodings and on size."""
    if len(data) > MAX_SPEC_BYTES:
        raise SpecError(
            f"larger than {MAX_SPEC_BYTES} bytes",
            source=source,
            remedy="a spec is a few dozen lines; is this the right file?",
        )
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SpecError(
            f"not UTF-8 text ({error.reason})", source=source, line=line, remedy="save it as UTF-8"
        ) from error


def parse_spec(text: str, source: str) -> Spec:
    """Read the text of a spec. `source` is what the user calls the file. Raises SpecError naming every problem."""
    if len(text.encode("utf-8", errors="surrogatepass")) > MAX_SPEC_BYTES:
        raise SpecError(f"larger than {MAX_SPEC_BYTES} bytes", source=source, remedy="a spec is a few dozen lines")
    lines: dict[Place, int] = {}
    try:
        data = _Builder(lines).build(_compose(text.removeprefix("\ufeff")))
    except _RefusedError as refused:
        raise _spec_error([refused.problem], source) from None
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        problems = _schema_problems(error, lines)
        raise _spec_error(sorted(problems, key=lambda problem: problem.line), source) from None
    # Of specs that arrive, and not of the schema: one that an older version took in must still be read back.
    if problem := _log_problem(spec.log) or _device_problem(spec):
        place, text, remedy = problem
        line = _line_of(lines, place)
        raise _spec_error([_Problem(line=line, field=_field_of(place), text=text, remedy=remedy)], source)
    return spec


def _schema_problems(error: ValidationError, lines: dict[Place, int]) -> list[_Problem]:
    details = error.errors(include_url=False)
    problems = []
    for detail in details:
        location, kind = tuple(detail["loc"]), detail["type"]
        if kind == UNKNOWN_PRESET:
            location = (*location, "preset")  # it is no field, so pydantic blames the section
        if kind == "too_short" and any(
            len(d["loc"]) > len(location) and d["loc"][: len(location)] == location for d in details
        ):
            continue  # it is only short because of items that have a problem of their own
        text = {"extra_forbidden": "there is no such field", "missing": "is required"}.get(kind, detail["msg"])
        problems.append(
            _Problem(
                line=_line_of(lines, location),
                field=_field_of(location),
                text=text.removeprefix("Value error, ").removeprefix("Input "),
                remedy=remedy_for(kind, location, detail.get("input"), detail.get("ctx") or {}),
            )
        )
    return problems


def _device_problem(spec: Spec) -> tuple[Place, str, str] | None:
    """Where it says that the trainer leaves its cards idle or sees none, why, and what to do; None if all is well."""
    gpus, device = spec.resources.gpus, "auto" if spec.trainer is None else spec.trainer.device
    place, remedy = ("resources", "gpus"), "leave it out, or set device: auto"
    if device == "cpu" and gpus:
        return place, f"{gpus}, but trainer.device is cpu: the cards would stand idle", remedy
    if device == "cuda" and gpus == 0:
        return place, "0, but trainer.device is cuda: the run would see no GPU", remedy
    return None


def _log_problem(log: LogSpec | None) -> tuple[Place, str, str] | None:
    """Where a reader is given that could never find a point, why, and what to do; None if it can."""
    if log is None:
        return None
    place = ("log", "pattern" if log.format == "regex" else "fields")
    if log.format == "jsonl":
        named: set[str] = set(log.fields or ())
    elif log.format == "regex":
        try:
            named = set(regex.compile(log.pattern or "").groupindex)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            return (
                place,
                f"not a regular expression: {error}",
                "correct it; put it in single quotes, so that YAML keeps backslashes",
            )
    else:
        return None
    if "step" not in named:
        return place, "no group named step", "write (?P<step>\\d+) where the step number stands"
    if not named.intersection(_SCORES):
        where = "name a group (?P<val_bpb>...)" if log.format == "regex" else "add `val_bpb: name_in_the_log`"
        return place, f"none of {', '.join(_SCORES)} is read", f"{where}, or val_loss, or train_loss"
    return None


def _compose(text: str) -> Node:
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1 if isinstance(error.position, int) else 0
        raise _RefusedError(line, f"a character that YAML does not allow ({error.reason})", "remove it") from None
    except yaml.MarkedYAMLError as error:
        raise _from_yaml(error) from None
    except RecursionError:
        raise _RefusedError(0, "nested too deeply", "no spec needs that") from None
    if node is None:
        raise _RefusedError(0, "the file is empty", "start with `name:`")
    return node


def _from_yaml(error: yaml.MarkedYAMLError) -> _RefusedError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 0
    problem = error.problem or "not YAML"
    if "expected a single document" in (error.context or ""):
        return _RefusedError(
            line, "several documents in one file", "put each spec into a file of its own and remove `---`"
        )
    if "'\\t'" in problem:
        return _RefusedError(line, "a tab where YAML wants spaces", "indent with spaces")
    context = f" ({error.context})" if error.context else ""
    return _RefusedError(
        line, f"not YAML: {problem}{context}", "check indentation, colons and quotes on this line and the one before"
    )


class _Builder:
    """Plain values from a node tree, noting on which line each path stands."""

    def __init__(self, lines: dict[Place, int]) -> None:
        self._lines = lines
        self._left = _MAX_NODES

    def build(self, root: Node) -> dict[str, Any]:
        if not isinstance(root, MappingNode):
            raise _RefusedError(_line(root), "a spec is a mapping of `field: value` lines", "start with `name:`")
        self._lines[()] = _line(root)
        return self._mapping(root, ())

    def _value(self, node: Node, path: Place) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _RefusedError(
                _line(node), f"more than {_MAX_NODES} values once aliases are expanded", "write it without aliases"
            )
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self._item(item, (*path, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)  # noqa: S101  # there are three kinds of nodes
        return _scalar(node, path)

    def _item(self, node: Node, path: Place) -> Any:
        if len(path) > _MAX_DEPTH:  # an alias that contains itself
            raise _RefusedError(_line(node), f"nested more than {_MAX_DEPTH} deep", "no spec needs that")
        self._lines.setdefault(path, _line(node))
        return self._value(node, path)

    def _mapping(self, node: MappingNode, path: Place) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = _line(key_node)
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise _RefusedError(line, "the merge key << is not allowed", "write the fields out")
            if not isinstance(key_node, ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                shown = key_node.value if isinstance(key_node, ScalarNode) else "this key"
                raise _RefusedError(
                    line, f"{shown} is not text, and a key must be", "put it in quotes", _field_of(path)
                )
            key = key_node.value
            if key in first_lines:
                text = f"given twice, on lines {first_lines[key]} and {line}"
                raise _RefusedError(line, text, "keep one of the two", _field_of((*path, key)))
            first_lines[key] = line
            self._lines[*path, key] = line
            values[key] = self._item(value_node, (*path, key))
        return values


def _scalar(node: ScalarNode, path: Place) -> Any:
    constructor = yaml.constructor.SafeConstructor()
    try:
        return constructor.construct_object(node)
    except (ValueError, OverflowError, yaml.YAMLError):
        shown = node.value if len(node.value) <= 40 else node.value[:40] + "..."
        text = f"{shown} looks like a number or date but is none"
        raise _RefusedError(_line(node), text, "put it in quotes, or correct it", _field_of(path)) from None


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _line_of(lines: dict[Place, int], location: Place) -> int:
    """The line of the nearest thing that is in the file: of a missing field, the section that lacks it."""
    for length in range(len(location), -1, -1):
        if (line := lines.get(location[:length])) is not None:
            return line
    return 0


def _field_of(location: Place) -> str:
    return ".".join(str(part) for part in location if part != "[key]")


def _spec_error(problems: list[_Problem], source: str) -> SpecError:
    first = problems[0]
    if len(problems) == 1:
        return SpecError(first.text.rstrip("."), source=source, line=first.line, field=first.field, remedy=first.remedy)
    each = [SpecError(p.text.rstrip("."), source=source, line=p.line, field=p.field, remedy=p.remedy) for p in problems]
    listing = "\n".join(f"  {error}" for error in each)
    return SpecError(f"{len(problems)} problems:\n{listing}".rstrip("."), source=source)
