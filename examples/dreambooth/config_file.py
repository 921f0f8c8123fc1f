# SPDX-License-Identifier: Apache-2.0
"""`--config FILE`: the flags of a run in a YAML file, `name: value` per line, as TRL and kohya's scripts have them."""

from __future__ import annotations

import argparse
import difflib
import functools
from pathlib import Path

import yaml

from . import TrainingError

YES, NO = ("true", "yes", "on"), ("false", "no", "off")


def read_config(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """The file as words of a command line, for `parser` to check like any other.

    Every value is taken as it is written ("5e-4" and "no" are no numbers and no booleans of YAML's). A list is one for
    a flag with several values; a flag without a value takes true or false.

    Raises:
        TrainingError: names the file, the line and the key that is unknown, there twice, or of another kind.
    """
    actions = {
        option.removeprefix("--"): action
        for action in parser._actions  # argparse has no other list of them
        for option in action.option_strings
        if option.startswith("--") and action.dest not in ("help", "config")
    }
    words: list[str] = []
    seen: set[str] = set()
    for key, value in _pairs(path):
        where = f"{path}, line {key.start_mark.line + 1}: {key.value!r}"
        action = actions.get(key.value)
        if action is None:
            near = difflib.get_close_matches(key.value, actions, 1)
            hint = f"; is it {near[0]!r}?" if near else "; expected flags as in --help, without the dashes"
            raise TrainingError(f"{where} is no flag of this script{hint}")
        if action.dest in seen:
            raise TrainingError(f"{where} is there twice: keep one.")
        seen.add(action.dest)
        if isinstance(value, yaml.SequenceNode) and action.nargs in ("+", "*"):
            texts = [_text(item, where) for item in value.value]
            words += [f"--{key.value}", *texts] if texts else []
        elif action.nargs == 0:
            text = _text(value, where).lower()
            if text not in YES + NO:
                raise TrainingError(f"{where} is {text!r}: expected true or false.")
            words += [f"--{key.value}"] if text in YES else []
        elif not (isinstance(value, yaml.ScalarNode) and value.tag == "tag:yaml.org,2002:null"):
            words += [f"--{key.value}={_text(value, where)}"]
    complaint = parser.error
    try:  # here, so that the message names the file and not only the flag
        parser.error = functools.partial(_refuse, path)
        parser.parse_args(words)
    finally:
        parser.error = complaint
    return words


def _refuse(path: str, message: str) -> None:
    raise TrainingError(f"--config {path}: {message}")


def _pairs(path: str) -> list[tuple[yaml.Node, yaml.Node]]:
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"--config {path} cannot be read ({error}): expected a YAML file.") from error
    except yaml.YAMLError as error:
        raise TrainingError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise TrainingError(f"--config {path}: expected lines of `name: value`, with the flags' names.")
    return root.value


def _text(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise TrainingError(f"{where} has several values: expected one.")
    return node.value
