"""Clients of a benchmark that wait for each answer before they ask again. Must not judge."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import aiohttp
from asking import Answer, ask, body_of, headers_of, unstreamed, url_of, whole
from stack import BenchFailed, Stack


class Load:
    """Clients that ask one request after the other until the block ends, in a thread of their own;
    every second one does not take a stream. ``question`` has a place for a number."""

    def __init__(self, stack: Stack, model: str, question: str, clients: int, tokens: int) -> None:
        self._stack = stack
        self._model, self._question = model, question
        self._clients, self._tokens = clients, tokens
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), daemon=True)
        self.asked = 0
        self.faults: list[str] = []
        self.by_replica: Counter[str] = Counter()

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(150)
        if self._thread.is_alive():
            raise BenchFailed("the clients did not end: a request was never answered")

    async def _all(self) -> None:
        async with aiohttp.ClientSession(headers=headers_of(self._stack)) as session:
            await asyncio.gather(*(self._one(session, number) for number in range(self._clients)))

    async def _one(self, session: aiohttp.ClientSession, number: int) -> None:
        while not self._over.is_set():
            self.asked += 1
            body = body_of(self._model, self._question.format(self.asked), self._tokens)
            answer = Answer(0.0)
            if number % 2:
                await whole(session, url_of(self._stack), unstreamed(body), answer)
            else:
                await ask(session, url_of(self._stack), body, answer)
            if not answer.fault and answer.tokens != self._tokens:
                answer.fault = f"{answer.tokens} tokens instead of {self._tokens}"
            if answer.fault:
                self.faults.append(f"{answer.replica}: {answer.fault}")
            self.by_replica[answer.replica] += 1
