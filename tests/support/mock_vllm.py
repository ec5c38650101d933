"""A small server that speaks as vLLM's does, on a Unix socket, without a model.

Its "tokens" are numbers; each depends on all before it, so that an answer that was resumed can be
compared with the one that was not. What is said in a prompt makes it misbehave: ``die`` ends the
process after two tokens, ``hang`` stops it in the middle, ``refuse`` is a 400.

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

END = 0
CONTEXT = 512


def next_token(tokens: list[int]) -> int:
    mixed = 17
    for token in tokens:
        mixed = (mixed * 31 + token + 1) % 1009
    return END if mixed % 41 == 0 else mixed


def answer_tokens(prompt: list[int], limit: int, ignore_eos: bool = False) -> list[int]:
    """What is generated after ``prompt``: at most ``limit`` tokens, the end token included."""
    found: list[int] = []
    while len(found) < limit:
        token = next_token([*prompt, *found])
        found.append(token or (7 if ignore_eos else END))
        if found[-1] == END:
            break
    return found


def tokenise(text: str) -> list[int]:
    return [len(word) + 1 for word in text.split()]


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

    def app(self) -> web.Application:
        app = web.Application(client_max_size=16 << 20)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/metrics", self.metrics),
                web.get("/v1/models", self.models),
                web.post("/v1/chat/completions", self.generate),
                web.post("/v1/completions", self.generate),
                web.post("/tokenize", self.tokenize),
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

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = body.get("prompt") or " ".join(m["content"] for m in body["messages"])
        return web.json_response({"tokens": tokenise(text), "count": 1})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if body["model"] not in (self.name, *self.adapters):
            return _error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        said = json.dumps(body.get("messages") or body.get("prompt"))
        if "refuse" in said:
            return _error(400, "vLLM does not like it", "BadRequestError")
        prompt = body.get("prompt")
        if not isinstance(prompt, list):
            prompt = tokenise(said)
        limit = body.get("max_tokens") or 16
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
        for count, token in enumerate(tokens, 1):
            if count == 3 and "die" in said:
                os._exit(3)
            if count == 3 and "hang" in said:
                await self.frozen.wait()
            await asyncio.sleep(0.002)
            self.steps += 1
            last = count == len(tokens)
            reason = None if not last else ("stop" if token == END else "length")
            chunk = self._chunk(body, prompt, token, count, reason)
            raw = b"data: " + json.dumps(chunk).encode() + b"\n\n"
            await response.write(raw[:9])
            await response.write(raw[9:])
        await response.write(b"data: [DONE]\n\n")
        return response

    def _chunk(
        self, body: dict[str, Any], prompt: list[int], token: int, count: int, reason: str | None
    ) -> dict[str, Any]:
        text = "" if token == END else f"t{token} "
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        if "messages" in body:
            choice["delta"] = {"content": text}
        else:
            choice |= {"text": text, "token_ids": [token]}
            if body.get("logprobs") is not None:
                choice["logprobs"] = {
                    "tokens": [f"token_id:{token}"],
                    "token_logprobs": [-0.5],
                    "top_logprobs": [{f"token_id:{token}": -0.5}],
                }
        return {
            "id": "mock",
            "object": "chunk",
            "created": 1,
            "model": body["model"],
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": count,
                "total_tokens": len(prompt) + count,
            },
        }

    def _whole(self, body: dict[str, Any], prompt: list[int], tokens: list[int]) -> dict[str, Any]:
        text = "".join(f"t{token} " for token in tokens if token != END)
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
