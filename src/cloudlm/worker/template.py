"""Chat templates: from messages to the prompt that the model was trained on.

Only the model's own template is ever used, never one of a request, and it is rendered in a child
process with caps on CPU time, memory and output (see ``render``). What people wrote reaches the
template as data; control tokens inside it are taken out before and put back as plain text by
``tokenise``. Must not know HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from cloudlm.core.chat import Message
from cloudlm.core.errors import BrokenModel, InternalError, InvalidRequest
from cloudlm.worker.render import frame

MAX_TEMPLATE_CHARACTERS = 256 * 1024
MAX_OUTPUT_CHARACTERS = 8_000_000
CPU_LIMIT_S = 1.0
WALL_LIMIT_S = 10.0
MEMORY_LIMIT_BYTES = 1 << 30
_STARTUP_S = 20.0  # an interpreter's start on a busy machine
_SMALL_BYTES = 64 << 10  # JSON that is read or written in well under a millisecond


class Renderer(Protocol):
    """Turns messages into a prompt."""

    async def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt's text; ``tools`` are shown as they are. Raises InvalidRequest if the template
        refuses the messages, or if the model has none; BrokenModel if the template fails."""
        ...

    async def close(self) -> None: ...


class NoTemplate:
    """The renderer of a model without a chat template."""

    async def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        raise InvalidRequest(
            "this model has no chat template, so it cannot be used with messages; "
            "send its prompt as text to /v1/completions",
            param="messages",
        )

    async def close(self) -> None:
        return None


class TemplateProcess:
    """A model's chat template in its own process, started at the first rendering and again after
    one that had to be ended. ``variables`` are the model's special tokens (``bos_token``, …)."""

    def __init__(
        self,
        template: str,
        variables: Mapping[str, str],
        *,
        cpu_s: float = CPU_LIMIT_S,
        wall_s: float = WALL_LIMIT_S,
        memory_bytes: int = MEMORY_LIMIT_BYTES,
        output_limit: int = MAX_OUTPUT_CHARACTERS,
    ) -> None:
        self._variables = dict(variables)
        self._wall_s = wall_s
        self._start = {
            "template": template,
            "output_limit": output_limit,
            "cpu_s": cpu_s,
            "memory_bytes": memory_bytes,
        }
        self._too_long = len(template) > MAX_TEMPLATE_CHARACTERS
        self._cpu_s = cpu_s
        self._broken: str | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._closed = False

    async def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """See Renderer."""
        body = {
            **self._variables,
            "messages": [_as_dict(message) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        async with self._turn:
            # A conversation with tools may be large in places that are not worth counting.
            deep = bool(tools) or any(message.tool_calls for message in messages)
            size = sum(len(message.content) + len(message.reasoning or "") for message in messages)
            outcome = await self._ask(body, size + (_SMALL_BYTES if deep else 0))
        return _text_of(outcome)

    async def start(self) -> str | None:
        """Compile the template now; returns what is wrong with it, or None."""
        async with self._turn:
            try:
                await self._running()
            except BrokenModel as error:
                return error.message
        return None

    async def close(self) -> None:
        self._closed = True
        await self._end()

    async def _ask(self, body: Mapping[str, Any], size: int) -> Mapping[str, Any]:
        process = await self._running()
        try:
            return await self._exchange(process, body, size, self._wall_s)
        except (EOFError, TimeoutError, OSError):
            raise BrokenModel(
                "the model's chat template did not end within "
                f"{self._cpu_s:g} s of CPU time and was stopped"
            ) from None

    async def _running(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise InternalError("the worker is stopping")
        if self._too_long:
            self._broken = f"it is longer than {MAX_TEMPLATE_CHARACTERS} characters"
        if self._broken is not None:
            raise BrokenModel(f"the model's chat template cannot be used: {self._broken}")
        if self._process is None or self._process.returncode is not None:
            self._process = await _spawn()
            self._broken = await self._compile(self._process)
            if self._broken is not None:
                await self._end()
                raise BrokenModel(f"the model's chat template cannot be used: {self._broken}")
        return self._process

    async def _compile(self, process: asyncio.subprocess.Process) -> str | None:
        size, wall_s = MAX_TEMPLATE_CHARACTERS, self._wall_s + _STARTUP_S
        try:
            outcome = await self._exchange(process, self._start, size, wall_s)
        except (EOFError, TimeoutError, OSError):
            return "it does not compile within the time and memory allowed"
        broken = outcome.get("broken")
        return None if broken is None else str(broken)

    async def _exchange(
        self, process: asyncio.subprocess.Process, body: Mapping[str, Any], size: int, wall_s: float
    ) -> Mapping[str, Any]:
        """One question and its answer. What breaks it off, a cancellation included, ends the
        process: the answer would be taken for the next question's."""
        try:
            async with asyncio.timeout(wall_s):
                return await _exchange(process, body, size)
        except BaseException:
            await self._end()
            raise

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()


async def _spawn() -> asyncio.subprocess.Process:
    keep = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cloudlm.worker.render",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={name: os.environ[name] for name in keep if name in os.environ},
    )


async def _exchange(
    process: asyncio.subprocess.Process, body: Mapping[str, Any], size: int
) -> Mapping[str, Any]:
    """One question and its answer; ``size`` is roughly the question's length, characters."""
    assert process.stdin is not None
    assert process.stdout is not None
    small = size <= _SMALL_BYTES
    process.stdin.write(frame(body) if small else await asyncio.to_thread(frame, body))
    await process.stdin.drain()
    head = await process.stdout.readexactly(4)
    data = await process.stdout.readexactly(int.from_bytes(head, "big"))
    decoded: Mapping[str, Any] = (
        json.loads(data) if len(data) <= _SMALL_BYTES else await asyncio.to_thread(json.loads, data)
    )
    return decoded


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as Hugging Face's templates expect it: arguments are objects, not texts."""
    fields: dict[str, Any] = {"role": str(message.role), "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    return fields


def _text_of(outcome: Mapping[str, Any]) -> str:
    if "refused" in outcome:
        raise InvalidRequest(
            f"the model's chat template refuses these messages: {outcome['refused']}",
            param="messages",
        )
    if "text" not in outcome:
        raise BrokenModel(
            f"the model's chat template failed on these messages: {outcome.get('failed')}"
        )
    return str(outcome["text"])
