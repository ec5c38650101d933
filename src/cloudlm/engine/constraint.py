"""Compiles constraints to guides, which know at every token what may come next.

All the work is llguidance's. Compiling takes milliseconds, and as long as its limits allow for what
somebody wrote in bad faith: so it happens in a thread of its own (``compiling``), never in the
engine's, and a caller waits for it only until a deadline. Must not import torch.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cloudlm.core.chat import Constraint
from cloudlm.core.errors import (
    InternalError,
    InvalidRequest,
    MissingExtra,
    NotSupported,
)
from cloudlm.engine.api import GenerateRequest
from cloudlm.engine.compiling import Compiling
from cloudlm.engine.lark import lark_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 64  # constraints that are kept for the next request, compiled or refused
_REPLAY_TOKENS = 256  # tokens given to the matcher at once on resume
_SOURCE = re.compile(r"\n\s*\d+ \| .*", re.DOTALL)  # llguidance shows where in our own text


class Vocabulary(Protocol):
    """What of a tokenizer the compiler needs."""

    special_token_ids: frozenset[int]

    def vocabulary(self, size: int) -> list[bytes] | None:
        """The bytes that each of ``size`` token ids stands for; None if they stand for none."""
        ...

    def encode(self, text: str) -> list[int]: ...


class TokenGuide:
    """The place of one sequence's answer in its constraint. Used by one thread at a time.

    ``finished``: the answer is complete and nothing can follow. ``fault``: it cannot go on, with
    the reason; what was written before is no answer.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self.fault: str | None = None
        self._look()

    @property
    def finished(self) -> bool:
        stopped = bool(self._matcher.is_stopped())
        return self.fault is None and stopped and bool(self._matcher.is_accepting())

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens [vocabulary] may come next; all of them once there is a ``fault``. Lets
        other threads run meanwhile."""
        if self.fault is None:
            packed = np.zeros((self._vocab_size + 32) // 32, dtype=np.int32)
            self._guarded(self._matcher.unsafe_compute_mask_ptr, packed.ctypes.data, packed.nbytes)
            bits = np.unpackbits(packed.view(np.uint8), bitorder="little")
            allowed: NDArray[np.bool_] = bits[: self._vocab_size].view(np.bool_)
            if self.fault is None and allowed.any():
                return allowed
            self.fault = self.fault or "no token of this model's vocabulary can follow"
        return np.ones(self._vocab_size, dtype=np.bool_)

    def accept(self, token_ids: Sequence[int]) -> None:
        """Go on by these tokens."""
        if self.fault is None:
            taken = self._guarded(self._matcher.consume_tokens, list(token_ids))
            if not taken and self.fault is None:
                self.fault = "the tokens do not follow the constraint"

    def copy(self) -> TokenGuide:
        """Another guide at the same place."""
        return TokenGuide(self._matcher.deep_copy(), self._vocab_size)

    def _guarded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """A fault inside the library is this sequence's alone. Its panics are no Exceptions."""
        try:
            result = call(*arguments)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            self.fault = f"the constraint's engine failed ({type(error).__name__})"
            return None
        self._look()
        return result

    def _look(self) -> None:
        if self._matcher.is_error():
            self.fault = _reason(self._matcher.get_error())


def guide_of(request: GenerateRequest) -> TokenGuide | None:
    """The request's guide. Raises InternalError if a constraint comes without the guide that this
    engine made for it: the answer would not follow it."""
    if request.sampling.constraint is None and request.guide is None:
        return None
    if not isinstance(request.guide, TokenGuide):
        raise InternalError("a constrained sequence was submitted without its guide")
    return request.guide


class Constrainer:
    """Makes guides for one model. Made with the engine; loads llguidance at the first constraint.

    ``eos_token_ids`` end an answer where the constraint allows it to end.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        compiling: Compiling | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos = [one for one in eos_token_ids if one < vocab_size]
        self._compiling = compiling or Compiling()
        # The compiling thread's own:
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, TokenGuide | InvalidRequest] = OrderedDict()

    async def guide(self, constraint: Constraint, output_token_ids: Sequence[int]) -> TokenGuide:
        """A guide that has gone by ``output_token_ids`` already.

        Raises InvalidRequest (the constraint is wrong, too complex, or no token of the model can
        begin it; the tokens do not follow it), NotSupported, MissingExtra, and as
        ``Compiling.run``.
        """
        if self._tokenizer is None:  # takes seconds for a large vocabulary, and is nobody's fault
            await self._compiling.run(self._load, limited=False)
        return await self._compiling.run(lambda: self._make(constraint, tuple(output_token_ids)))

    def close(self) -> None:
        """Stop the thread after what it is doing."""
        self._compiling.close()

    def _make(self, constraint: Constraint, output_token_ids: tuple[int, ...]) -> TokenGuide:
        known = self._known(constraint)
        if isinstance(known, InvalidRequest):
            raise InvalidRequest(known.message, param=known.param)  # each with its own traceback
        guide = known.copy()
        for begin in range(0, len(output_token_ids), _REPLAY_TOKENS):
            guide.accept(output_token_ids[begin : begin + _REPLAY_TOKENS])
        if guide.fault is not None:
            raise InvalidRequest(
                f"output_token_ids do not follow the constraint: {guide.fault}",
                param="output_token_ids",
            )
        return guide

    def _known(self, constraint: Constraint) -> TokenGuide | InvalidRequest:
        """The guide at its beginning, or why there is none: what was refused costs once, too."""
        known = self._compiled.get(constraint)
        if known is None:
            try:
                known = self._compile(constraint)
            except InvalidRequest as error:
                known = InvalidRequest(error.message, param=error.param)
            self._compiled[constraint] = known
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(constraint)
        return known

    def _compile(self, constraint: Constraint) -> TokenGuide:
        """Compile and try the first token, so that what can never work is refused now."""
        library = _llguidance()
        # Speeds are llguidance's own figures: what one token may cost is about 10 ms.
        limits = library.LLParserLimits(
            initial_lexer_fuel=1_000_000,
            step_lexer_fuel=100_000,
            step_max_items=50_000,
            max_lexer_states=50_000,
            max_grammar_size=200_000,
            verbose_errors=False,
        )
        try:
            text = lark_of(constraint)
            matcher = library.LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        except RecursionError:
            raise InvalidRequest("the constraint is nested too deeply") from None
        guide = TokenGuide(matcher, self._vocab_size)
        if guide.fault is None and not guide.finished:
            trial = guide.copy()  # what is kept stays as it is
            trial.mask()
            guide.fault = trial.fault
        if guide.fault is not None:
            raise InvalidRequest(
                f"the {constraint.kind.value.replace('_', ' ')} cannot be followed: {guide.fault}"
            )
        return guide

    def _load(self) -> None:
        """Raises NotSupported, MissingExtra."""
        if self._tokenizer is not None:
            return
        library = _llguidance()
        tokens = self._vocabulary.vocabulary(self._vocab_size)
        if tokens is None:
            raise NotSupported(
                "this model's tokenizer does not tell which bytes its tokens stand for, so its "
                "answers cannot be constrained"
            )
        # One more than there are: ends the answers of a model that has no end token of its own. It
        # is beyond every mask, since a guide that allows nothing else is finished.
        ends = self._eos or [self._vocab_size]
        wrapper = _Wrapper([*tokens, b""], ends, self._vocabulary)
        self._tokenizer = library.LLTokenizer(wrapper, eos_token=ends)


class _Wrapper:
    """A tokenizer as llguidance reads it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], ends: list[int], vocabulary: Vocabulary) -> None:
        self.tokens = tokens
        self.eos_token_id = ends[0]
        self.special_token_ids = sorted(
            {*ends, *(one for one in vocabulary.special_token_ids if one < len(tokens))}
        )
        self._vocabulary = vocabulary

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text if isinstance(text, str) else text.decode("utf-8", "ignore")
        return self._vocabulary.encode(plain)


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtra("engine", "a constrained answer") from error
    return llguidance


def _reason(error: str) -> str:
    """The library's words without the text that it was given and the state that it was in."""
    first = _SOURCE.sub("", error.split("\n<")[0])
    first = re.sub(r"^(at )?\d+\(\d+\): ", "", first)
    plain = " ".join(first.split())
    if "panic" in plain or plain.startswith("NoExtension"):
        return "no token of this model's vocabulary can follow"
    return plain[:300] or "it is too complex"
