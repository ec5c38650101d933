"""A small server that speaks as vLLM's does, on a Unix socket, without a model.

Its tokens are those of ``mock_vllm_text``. What is said in a prompt makes it misbehave: ``die``
ends the process after two tokens, ``hang`` stops it in the middle, ``refuse`` is a 400.

    python mock_vllm.py --uds SOCKET --model FOLDER --served-model-name NAME …
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from aiohttp import web
from mock_vllm_text import BROKEN, END, Speech, answer_tokens, text_of, tokenise

__all__ = ["END", "MockVllm", "answer_tokens", "mock_python", "tokenise"]

CONTEXT = 512


class MockVllm:
    """The server's state, which tests may look at and change."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps = 0
        self.running = 0
        self.engine_dead = False
        self.adapters: dict[str, str] = {}
        self.asleep = 0
        self.bodies: list[dict[str, Any]] = []
        self.aborted = 0
        self.frozen = asyncio.Event()
        self.per_chunk = 1  # tokens, as many as vLLM makes while its reader is slow
        self.cached = 2
        self.knows_token_ids = True  # versions before 0.10.2 do not
        self.dies_after = 0  # chunks; 0: never

    def app(self) -> web.Application:
        app = web.Application(client_max_size=16 << 20)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/metrics", self.metrics),
                web.get("/v1/models", self.models),
                web.get("/version", self.version),
                web.post("/v1/chat/completions", self.generate),
                web.post("/v1/completions", self.generate),
                web.post("/tokenize", self.tokenize),
                web.post("/detokenize", self.detokenize),
                web.post("/v1/load_lora_adapter", self.load),
                web.post("/v1/unload_lora_adapter", self.unload),
                web.post("/sleep", self.sleep),
                web.post("/wake_up", self.wake),
            ]
        )
        return app

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.engine_dead else 200)

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        labels = f'{{engine="0",model_name="{self.name}"}}'
        values = {
            "vllm:num_requests_running": self.running,
            "vllm:num_requests_waiting": 0,
            "vllm:generation_tokens_total": self.steps,
            "vllm:prompt_tokens_total": 3 * len(self.bodies),
        }
        lines = [f"{name}{labels} {value}.0" for name, value in values.items()]
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"# HELP of something\n")
        await asyncio.sleep(0)  # in two pieces, as long bodies come
        await response.write(("\n".join(lines) + "\n").encode())
        await response.write_eof()
        return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.name, "max_model_len": CONTEXT}]})

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "0.32.0"})

    async def detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"prompt": text_of((await request.json())["tokens"])})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"tokens": _prompt(body), "count": 1})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if body["model"] not in (self.name, *self.adapters):
            return _error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        said = json.dumps(body.get("messages") or body.get("prompt"))
        if "refuse" in said:
            return _error(400, "vLLM does not like it", "BadRequestError")
        prompt = _prompt(body)
        room = CONTEXT - len(prompt)
        limit = body.get("max_tokens") or (room if "messages" in body else 16)
        tokens = answer_tokens(prompt, limit, bool(body.get("ignore_eos")))
        self.running += 1
        try:
            if body.get("stream"):
                return await self._stream(request, body, prompt, tokens, said)
            if "hang" in said:
                await self.frozen.wait()
            return web.json_response(self._whole(body, prompt, tokens))
        except (ConnectionResetError, asyncio.CancelledError):
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    async def _stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        prompt: list[int],
        tokens: list[int],
        said: str,
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        speech = Speech(body, prompt, self.knows_token_ids, self.cached)
        heaps = [tokens[at : at + self.per_chunk] for at in range(0, len(tokens), self.per_chunk)]
        if "messages" in body:
            await _send(response, speech.opening())
        for count, heap in enumerate(heaps, 1):
            if count == 3 and "die" in said:
                os._exit(3)
            if count == 3 and "hang" in said:
                await self.frozen.wait()
            if count - 1 == self.dies_after > 0 and request.transport is not None:
                request.transport.close()
                return response
            await asyncio.sleep(0.002)
            self.steps += len(heap)
            await _send(response, speech.chunk(heap, last=count == len(heaps)))
            if speech.ended:
                break
        if (body.get("stream_options") or {}).get("include_usage"):
            await _send(response, speech.usage())
        await response.write(b"data: [DONE]\n\n")
        return response

    def _whole(self, body: dict[str, Any], prompt: list[int], tokens: list[int]) -> dict[str, Any]:
        text = text_of(tokens).rstrip(BROKEN)  # half a character is not shown
        self.steps += len(tokens)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": text}}
        if "messages" not in body:
            choice = {"index": 0, "finish_reason": "stop", "text": text}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens), "total_tokens": 0}
        return {"id": "mock", "model": body["model"], "choices": [choice], "usage": usage}

    async def load(self, request: web.Request) -> web.Response:
        body = await request.json()
        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            return _error(404, "No adapter found", "NotFoundError")
        self.adapters[body["lora_name"]] = body["lora_path"]
        return web.Response(text="Success")

    async def unload(self, request: web.Request) -> web.Response:
        del self.adapters[(await request.json())["lora_name"]]
        return web.Response(text="Success")

    async def sleep(self, request: web.Request) -> web.Response:
        self.asleep = int(request.query["level"])
        return web.json_response({"status": "sleeping"})

    async def wake(self, request: web.Request) -> web.Response:
        self.asleep = 0
        return web.json_response({"status": "awake"})


def _prompt(body: dict[str, Any]) -> list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return prompt
    return tokenise(prompt or " ".join(message["content"] for message in body["messages"]))


async def _send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    raw = b"data: " + json.dumps(chunk).encode() + b"\n\n"
    await response.write(raw[:9])
    await response.write(raw[9:])


def _error(status: int, message: str, kind: str) -> web.Response:
    error = {"message": message, "type": kind, "param": None, "code": status}
    return web.json_response({"error": error}, status=status)


async def serve(arguments: argparse.Namespace) -> None:
    if (arguments.model / "refused-by-vllm.txt").exists():
        sys.stderr.write("ValueError: Unsupported head size 17\n")
        sys.stderr.write("RuntimeError: Engine core initialization failed. See root cause above.\n")
        raise SystemExit(1)
    mock = MockVllm(arguments.served_model_name)
    runner = web.AppRunner(mock.app(), handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, str(arguments.uds)).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--uds", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--served-model-name", required=True)
    arguments, rest = parser.parse_known_args()
    assert "--trust-remote-code" not in rest
    asyncio.run(serve(arguments))


def mock_python(folder: Path) -> Path:
    """A program that can stand where ``vllm.python`` is expected."""
    program = folder / "python"
    program.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = "-c" ]; then exit 0; fi\n'
        f'shift 2\nexec "{sys.executable}" "{Path(__file__).resolve()}" "$@"\n'
    )
    program.chmod(0o755)
    return program


if __name__ == "__main__":
    main()
