"""The child process that renders chat templates: ``python -m cloudlm.worker.render``.

A chat template is a program that came with the model's bytes. Jinja's sandbox keeps it from
reaching Python, but not from looping or allocating without end, and no thread can be stopped while
it does. So templates run in a process of their own, which the kernel ends when a rendering uses too
much CPU time and which cannot allocate more than its share.

Frames on stdin and stdout: four bytes of length (big-endian), then JSON. The first frame in is
``{"template", "output_limit", "cpu_s", "memory_bytes"}``, answered by ``{}`` or ``{"broken": …}``;
each later frame in is the template's variables, answered by ``{"text": …}``,
``{"refused": …}`` (the template called raise_exception) or ``{"failed": …}``. Must not import
anything of cloudlm, read a file or open a connection.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, BinaryIO

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_FRAME_BYTES = 256 * 1024 * 1024
_MESSAGE_LIMIT = 500


class Refused(TemplateError):
    """The template itself said that it cannot render these messages."""


class OutputTooLong(Exception):
    """The rendering is longer than allowed."""


class GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's turns for training; here it is passed through."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> None:
    raise Refused(str(message)[:_MESSAGE_LIMIT])


def _strftime_now(form: object) -> str:
    return datetime.now().astimezone().strftime(str(form)[:100])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's templates expect it: not escaped for HTML, Unicode kept."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def environment() -> ImmutableSandboxedEnvironment:
    """A sandbox with the functions, filters and whitespace rules that chat templates rely on
    (those of Hugging Face's ``apply_chat_template``)."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    return made


def render(pieces: Any, output_limit: int) -> str:
    """Join what the template yields. Raises OutputTooLong beyond ``output_limit`` characters."""
    parts: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > output_limit:
            raise OutputTooLong
        parts.append(piece)
    return "".join(parts)


def answer(generate: Callable[[dict[str, Any]], Any], variables: Any, limit: int) -> dict[str, str]:
    """Render once and say how it went; nothing that a template does escapes as an exception."""
    try:
        return {"text": render(generate(variables), limit)}
    except Refused as error:
        return {"refused": str(error)}
    except OutputTooLong:
        return {"failed": f"it wrote more than {limit} characters"}
    except MemoryError:
        return {"failed": "it used more memory than allowed"}
    except RecursionError:
        return {"failed": "it calls itself without end"}
    except Exception as error:  # a template may raise anything
        return {"failed": f"{type(error).__name__}: {str(error)[:_MESSAGE_LIMIT]}"}


def read_frame(stream: BinaryIO) -> Any:
    """The next frame's JSON, None at the end of the stream."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    size_bytes = int.from_bytes(head, "big")
    if size_bytes > MAX_FRAME_BYTES:
        return None
    return json.loads(stream.read(size_bytes))


def frame(value: Any) -> bytes:
    """One frame; lone surrogates survive as escapes."""
    data = json.dumps(value).encode()
    return len(data).to_bytes(4, "big") + data


def _limit(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the worker ends this process by closing its stdin


def _compile(template: str) -> tuple[Any, dict[str, str]]:
    try:
        return environment().from_string(template).generate, {}
    except TemplateError as error:
        return None, {"broken": str(error)[:_MESSAGE_LIMIT]}
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        return None, {"broken": f"{type(error).__name__} while compiling it"}


def main() -> int:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    start = read_frame(source)
    if start is None:
        return 1
    _limit(start["memory_bytes"])
    cpu_s: float = start["cpu_s"]
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)  # compiling is the template's work, too
    generate, outcome = _compile(start["template"])
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    sink.write(frame(outcome))
    sink.flush()
    while generate is not None and (variables := read_frame(source)) is not None:
        signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)  # at zero the kernel ends this process
        outcome = answer(generate, variables, start["output_limit"])
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sink.write(frame(outcome))
        sink.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
