"""Chat templates in their process: what they may do, and what they cannot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest

from cloudlm.core.chat import Message
from cloudlm.core.errors import BrokenModel, InternalError, InvalidRequest
from cloudlm.worker.template import MAX_TEMPLATE_CHARACTERS, NoTemplate, TemplateProcess

HELLO = (Message("system", "Be kind."), Message("user", "Hé <b> {{ 7*7 }}", "ann"))
Make = Callable[..., TemplateProcess]


@pytest.fixture
async def make() -> AsyncIterator[Make]:
    made: list[TemplateProcess] = []

    def make(template: str, **more: object) -> TemplateProcess:
        made.append(TemplateProcess(template, {"bos_token": "<s>"}, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        await one.close()


async def render(template: TemplateProcess, *, prompt: bool = True) -> str:
    return await template.render(HELLO, add_generation_prompt=prompt)


async def test_renders_as_hugging_face_does(make: Make) -> None:
    template = make(
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if m.role == 'system' %}\n"
        "[{{ m['content'] | trim }}]\n"
        "    {% else %}\n"
        "{% generation %}{{ m.name }}: {{ m.content }}{% endgeneration %}\n"
        "    {% endif %}\n"
        "    {% if loop.last %}{% break %}{% endif %}\n"
        "{% endfor %}"
        "{{ messages[0] | tojson }}{{ {'b': 1, 'a': '<'} | tojson(indent=1) }}"
        "{% if add_generation_prompt %}>>{% endif %}"
        "{{ tools is none }}{{ strftime_now('%Y') | length }}"
    )
    text = await render(template)
    assert text == (
        "<s>[Be kind.]\nann: Hé <b> {{ 7*7 }}"
        '{"role": "system", "content": "Be kind."}{\n "b": 1,\n "a": "<"\n}>>True4'
    )
    assert ">>" not in await render(template, prompt=False)


async def test_raise_exception_is_the_callers_fault(make: Make) -> None:
    template = make("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        await render(template)
    assert caught.value.status == 400
    assert caught.value.param == "messages"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ ''['__class__'] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ '%s' | format(raise_exception.__globals__) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ (messages | attr('__class__')).__name__ }}",
    "{{ raise_exception.__globals__ }}",
    "{% set x = messages.append(1) %}{{ messages | length }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.promise(36)
@pytest.mark.parametrize("payload", ESCAPES)
async def test_the_sandbox_holds(make: Make, payload: str) -> None:
    try:
        text = await render(make(payload))
    except (BrokenModel, InvalidRequest):
        return
    assert text in ("", "[Undefined, Undefined]"), text


BOMBS = [
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{% for a in range(10 ** 12) %}{{ a }}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 10 ** (10 ** 8) }}",
    "{% set a = namespace(x='ab') %}{% for i in range(64) %}{% set a.x = a.x ~ a.x %}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{{ 'x' | center(10000000000) }}",
    "{% set ns = namespace(x=['l']) %}{% for i in range(64) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
]


@pytest.mark.promise(36)
@pytest.mark.parametrize("bomb", BOMBS)
async def test_a_template_without_end_is_ended(make: Make, bomb: str) -> None:
    template = make(bomb, cpu_s=0.3, memory_bytes=300 << 20)
    began = time.monotonic()
    with pytest.raises(BrokenModel, match="chat template"):
        await render(template)
    assert time.monotonic() - began < 60


@pytest.mark.promise(36)
async def test_output_has_a_cap(make: Make) -> None:
    template = make("{% for i in range(99999) %}0123456789{% endfor %}", output_limit=1000)
    with pytest.raises(BrokenModel, match="more than 1000 characters"):
        await render(template)


async def test_the_next_request_is_served_after_one_that_had_to_be_ended(make: Make) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = make("{% if add_generation_prompt %}" + loop + "{% endif %}fine", cpu_s=0.3)
    with pytest.raises(BrokenModel, match=r"0\.3 s of CPU time"):
        await render(template)
    assert await render(template, prompt=False) == "fine"


@pytest.mark.parametrize("broken", ["{% for %}", "{{ (", "(" * 300 + "{{" + "(" * 300 + "}}"])
async def test_a_template_that_does_not_compile_says_so(make: Make, broken: str) -> None:
    template = make(broken)
    reason = await template.start()
    assert reason is not None
    assert "cannot be used" in reason
    with pytest.raises(BrokenModel, match="cannot be used"):
        await render(template)


async def test_a_huge_template_is_refused(make: Make) -> None:
    reason = await make("x" * (MAX_TEMPLATE_CHARACTERS + 1)).start()
    assert reason is not None
    assert "longer than" in reason


async def test_a_start_that_is_cancelled_leaves_no_answer_for_the_next(make: Make) -> None:
    template = make("fine")
    for pause_s in (0.0, 0.01, 0.05):  # while it is spawned, while it compiles
        starting = asyncio.create_task(template.start())
        await asyncio.sleep(pause_s)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        assert await render(template) == await render(template) == "fine"
        await template._end()


async def test_after_close_nothing_is_started(make: Make) -> None:
    template = make("x")
    assert await template.start() is None
    await template.close()
    with pytest.raises(InternalError):
        await render(template)


async def test_a_model_without_a_template_points_to_completions() -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        await NoTemplate().render(HELLO, add_generation_prompt=True)
