from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.adapters.spec_yaml import MAX_SPEC_BYTES, decode_spec, parse_spec
from agent.domain.errors import SpecError
from agent.domain.specs import Spec

GOOD = """\
name: plain-gpt
hypothesis: The plain recipe reaches 2.1.
seeds: [1337, 7]
limits:
  tokens: 1e9
trainer:
  model:
    num_layers: 4
  optimizer:
    matrix_lr: 2e-2
"""
TRAINER = "name: model\nlimits: {steps: 5}\n"
COMMAND = "name: cmd\ncommand: [python, train.py]\n"


def refusal(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "a.yaml")
    return caught.value


def test_a_good_spec_is_read() -> None:
    spec = parse_spec(GOOD, "a.yaml")
    assert spec.trainer is not None
    assert spec.limits is not None
    assert spec.seeds == (1337, 7)
    assert spec.limits.tokens == 1_000_000_000
    assert spec.trainer.optimizer.matrix_lr == 0.02


def test_what_the_schema_dumps_is_read_back_equal() -> None:
    spec = parse_spec(GOOD, "a.yaml")
    again = parse_spec(yaml.safe_dump(spec.model_dump(mode="json")), "b.yaml")
    assert again == spec
    assert again.sha256() == spec.sha256()


@pytest.mark.parametrize(
    ("text", "line", "field", "problem", "remedy"),
    [
        (COMMAND + "priorty: 3\n", 3, "priorty", "no such field", "did you mean `priority`?"),
        (COMMAND + "num_layers: 3\n", 3, "num_layers", "no such field", "it belongs under `trainer.model:`"),
        (COMMAND + "zzz: 3\n", 3, "zzz", "no such field", "remove it; known here: name, hypothesis"),
        (COMMAND + "priority: high\n", 3, "priority", "valid integer", "whole number"),
        (COMMAND + "priority: 5000\n", 3, "priority", "less than or equal to 1000", "at most 1000"),
        (COMMAND + "hypothesis: 2026-01-02\n", 3, "hypothesis", "valid string", "put the value in quotes"),
        (COMMAND + "export: incumbant\n", 3, "export", "should be", "did you mean `incumbent`?"),
        (COMMAND + "limits:\n  tokens: 1,000\n", 4, "limits.tokens", "integer", "without commas"),
        (COMMAND + "resources:\n  vram: 3\n", 4, "resources.vram", "no such field", "did you mean `vram_gb`?"),
        (COMMAND + "seeds: 5\n", 3, "seeds", "valid tuple", "give a list: [5]"),
        (COMMAND + "seeds: [1, x]\n", 3, "seeds.1", "integer", "whole number"),
        (COMMAND + "env:\n  A: 1\n", 4, "env.A", "valid string", "put the value in quotes"),
        (COMMAND + "env:\n  A-B: x\n", 4, "env.A-B", "match pattern", "letters, digits and underscores"),
        (COMMAND + "env:\n  CADDIE_RUN: x\n", 3, "env", "is set by Caddie", ""),
        ("command: [python, train.py]\n", 1, "name", "is required", "add it"),
        ("name: Big Name\ncommand: [a]\n", 1, "name", "match pattern", "use lower-case letters"),
        ("name: cmd\ncommand: python train.py\n", 2, "command", "valid tuple", "no shell reads it"),
        ("name: cmd\n", 1, "", "exactly one of trainer and command", ""),
        (COMMAND + "name: again\n", 3, "name", "given twice, on lines 1 and 3", "keep one"),
        (COMMAND + "log: {format: regex}\n", 3, "log", "needs a pattern", ""),
        (COMMAND + "log:\n  format: regex\n  pattern: 'step (?P<step>'\n", 5, "log.pattern", "not a regular", "single"),
        (COMMAND + "log:\n  format: regex\n  pattern: 'a'\n", 5, "log.pattern", "no group named step", "(?P<step>"),
        (COMMAND + "log:\n  format: regex\n  pattern: '(?P<step>.)'\n", 5, "log.pattern", "none of val_bpb", "group"),
        (COMMAND + "log:\n  format: jsonl\n  fields: {step: s}\n", 5, "log.fields", "none of val_bpb", "add"),
        ("", 0, "", "empty", "name:"),
        ("# nothing\n", 0, "", "empty", "name:"),
        ("- a\n- b\n", 1, "", "mapping", "name:"),
        ("just words\n", 1, "", "mapping", "name:"),
        (COMMAND + "---\nname: two\n", 3, "", "several documents", "file of its own"),
        (COMMAND + "tags: !!python/object:os.system [a]\n", 3, "", "tag", "plain value"),
        (COMMAND + "priority: !!int 3\n", 3, "", "tag", "plain value"),
        (COMMAND + "env:\n\tA: x\n", 4, "", "tab", "spaces"),
        (COMMAND + "hypothesis: 'open\n", 4, "", "not YAML", "quotes"),
        (COMMAND + "true: 3\n", 3, "", "a key must be", "quotes"),
        (COMMAND + "base: &b {a: 1}\nenv:\n  <<: *b\n", 5, "", "merge key", "write the fields out"),
        (COMMAND + "hypothesis: *nowhere\n", 3, "", "undefined alias", "check"),
        (COMMAND + 'hypothesis: "\x07"\n', 3, "", "character", "remove"),
        (COMMAND + "priority: 2024-13-45\n", 3, "priority", "looks like a number or date", "quotes"),
        (COMMAND + f"priority: {'9' * 5000}\n", 3, "priority", "looks like a number", "quotes"),
        (TRAINER + "resources:\n  gpus: 2\ntrainer: {device: cpu}\n", 4, "resources.gpus", "stand idle", "leave it"),
        (TRAINER + "resources: {gpus: 0}\ntrainer: {device: cuda}\n", 3, "resources.gpus", "see no GPU", "leave it"),
    ],
)
def test_refusals_name_line_field_and_remedy(text: str, line: int, field: str, problem: str, remedy: str) -> None:
    error = refusal(text)
    assert (error.line, error.field) == (line, field)
    assert problem in error.problem
    assert remedy in error.remedy
    assert bool(error.remedy) == bool(remedy)


def test_what_an_older_version_took_in_is_read_back() -> None:
    """The ledger keeps specs for ever: what is refused on arrival alone must not keep it from being read."""
    taken = yaml.safe_load(TRAINER + "resources: {gpus: 2}\ntrainer: {device: cpu}\n")
    assert Spec.model_validate_json(json.dumps(taken)).processes == 2


def test_all_problems_are_told_at_once_in_the_order_of_the_file() -> None:
    message = str(refusal(COMMAND + "priorty: 3\nseeds: [x]\nlimits:\n  toks: 3\n"))
    assert message.startswith("a.yaml: 3 problems:")
    places = [line.split(" field")[0].strip() for line in message.splitlines()[1:]]
    assert places == ["a.yaml:3:", "a.yaml:4:", "a.yaml:6:"]
    assert message.count("Remedy:") == 3


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{" + "a," * 100_000, "more than"),
        (BOMB, "once aliases are expanded"),
        ("[" * 100_000, "deep"),
        ("a: " + "{a: " * 50_000, "deep"),
        ("- " * 100_000, "deep"),
        ("a: &a [*a]\n", "deep"),
        ("x" * (MAX_SPEC_BYTES + 1), "larger than"),
    ],
)
def test_bombs_are_refused(text: str, problem: str) -> None:
    assert problem in str(refusal(text))


def test_aliases_within_reason_are_welcome() -> None:
    spec = parse_spec(COMMAND + "env: {A: &v 'x', B: *v}\n", "a.yaml")
    assert spec.env == {"A": "x", "B": "x"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_honoured(encoding: str) -> None:
    text = COMMAND + "hypothesis: größer\n"
    assert parse_spec(decode_spec(text.encode(encoding), "a.yaml"), "a.yaml").hypothesis == "größer"


def test_another_encoding_is_refused_with_the_line() -> None:
    with pytest.raises(SpecError, match=r"a\.yaml:3: not UTF-8") as caught:
        decode_spec((COMMAND + "hypothesis: größer\n").encode("latin-1"), "a.yaml")
    assert "UTF-8" in caught.value.remedy


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=200) | st.from_regex(r"(name|seeds|log|env|trainer): ?[\[{&*!|>\-'\"]?.{0,20}\n", fullmatch=True)
)
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    for candidate in (text, COMMAND + text):
        try:
            assert isinstance(parse_spec(candidate, "a.yaml"), Spec)
        except SpecError as error:
            assert str(error).startswith("a.yaml")  # noqa: PT017  # either outcome is fine, nothing else is
