"""What a YAML text says. Whatever is wrong with it ends in one kind of error, on one line, which
says where and quotes no value: files may hold secrets.

Must not read files, and must not import the parser before somebody has YAML.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml


class NotYaml(ValueError):
    """A text that cannot be read; its own text says where and why."""


def parse_yaml(text: str | bytes) -> Any:
    """The one document of a text, None of an empty one; bytes are UTF-8. Raises NotYaml."""
    documents = parse_documents(text)
    if len(documents) > 1:
        raise NotYaml("it holds several documents, and one was expected")
    return documents[0] if documents else None


def parse_documents(text: str | bytes) -> list[Any]:
    """All documents of a text, which '---' divides. Raises NotYaml."""
    import yaml

    try:
        whole = text if isinstance(text, str) else text.decode("utf-8")
        SafeLoader = _safe_loader()
        return list(yaml.load_all(whole, Loader=SafeLoader))
    except UnicodeDecodeError as error:
        raise NotYaml(f"byte {error.start + 1} is not UTF-8") from None
    except yaml.YAMLError as error:
        raise NotYaml(_fault(error)) from None
    except RecursionError:
        raise NotYaml("it is nested too deeply") from None


@functools.cache
def _safe_loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, which lets errors of Python out where a value has the form of a date
        or number and is none (``2024-02-30``); those have a place in the text here too."""

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (ValueError, LookupError, AttributeError, ArithmeticError):
                kind = node.tag.rpartition(":")[2]
                raise yaml.constructor.ConstructorError(
                    None, None, f"no valid {kind}; a text belongs in quotes", node.start_mark
                ) from None

    return Loader


def _fault(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    problem = getattr(error, "problem", None) or getattr(error, "reason", None)
    return f"{where}{problem or type(error).__name__}"
