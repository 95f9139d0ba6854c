"""What no honest client sends: each is refused with its reason while the batch goes on."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from real_models import installed

from pinaivu_node.engine.client import open_engine
from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.types import (
    ChatMessage,
    Constraint,
    ConstraintKind,
    EngineBusy,
    EngineDead,
    FinishReason,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
    Tool,
    ToolCall,
    ToolChoice,
    ToolUse,
)

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]

FINE = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
HELLO = (ChatMessage("user", "hello"),)


def sampling(**changes) -> dict:
    return {"sampling": replace(FINE, **changes)}


def schema(said) -> dict:
    return {"constraint": Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(said))}


def regex(said: str) -> dict:
    return {"constraint": Constraint(ConstraintKind.REGEX, said)}


def tool(parameters: str, name: str = "f") -> dict:
    return {"tools": ToolUse((Tool(name, parameters=parameters),), choice=ToolChoice.REQUIRED)}


def chat(said: str) -> dict:
    return {"prompt": (ChatMessage("user", said),)}


def called(arguments: str) -> dict:
    call = ChatMessage("assistant", "", (ToolCall("1", "f", arguments),))
    told = ChatMessage("tool", "nothing", tool_call_id="1")
    return {"prompt": (*HELLO, call, told), "tools": ToolUse((Tool("f"),))}


MISCHIEF = """\
{%- set said = messages[-1]['content'] -%}
{%- if said == 'refuse' %}{{ raise_exception('no such chat') }}{% endif -%}
{%- if said == 'trip' %}{{ messages[0].nothing.at.all }}{% endif -%}
{%- if said == 'loop' -%}
{%- for a in range(99999) %}{% for b in range(99999) %}
{% set c = 1 %}
{% endfor %}{% endfor -%}
{%- endif -%}
{%- if said == 'count' %}{{ range(10 ** 9) | list }}{% endif -%}
"""
"""Before the model's own template: what a model's author could write, and a user set off."""


def nested(depth: int) -> dict:
    said: dict = {"type": "string"}
    for _ in range(depth):
        said = {"type": "object", "properties": {"a": said}, "required": ["a"]}
    return said


BAD = {
    "a million stop strings": (sampling(stop=("x",) * 10**6), "Too many stop strings"),
    "an endless stop string": (sampling(stop=("x" * 10**6,)), "characters of a stop string"),
    "a million stop tokens": (sampling(stop_token_ids=(5,) * 10**6), "Too many stop tokens"),
    "biases without end": (
        sampling(logit_bias=dict.fromkeys(range(10**5), 1.0)),
        "Too many biased tokens",
    ),
    "a bias on no token": (sampling(logit_bias={10**6: 1.0}), "There is no token 1000000"),
    "a bias that is no number": (sampling(logit_bias={5: math.nan}), "A bias must be"),
    "a prompt of no tokens": ({"prompt": (1, 2, 10**6)}, "There is no token 1000000"),
    "a negative token": ({"prompt": (1, -2)}, "There is no token -2"),
    "a token beyond all words": ({"prompt": (1, 2**62)}, "There is no token"),
    "an empty prompt": ({"prompt": ()}, "empty"),
    "a prompt over the context": ({"prompt": (5,) * 9000}, "maximum context length is 1024"),
    "a prompt over the pipe": ({"prompt": "x" * (17 << 20)}, "over the limit"),
    "half a character": ({"prompt": "a\ud800"}, "surrogates"),
    "turns and tokens": ({"prompt": (*HELLO, 5)}, "cannot be taken"),
    "tokens that are none": ({"prompt": (5, True)}, "cannot be taken"),
    "a token and a half": ({"prompt": (5, 1.5)}, "cannot be taken"),
    "no prompt at all": ({"prompt": None}, "cannot be taken"),
    "a chat that the template refuses": (chat("refuse"), "no such chat"),
    "a chat that the template trips over": (chat("trip"), "template refuses"),
    "a chat that the template never ends": (chat("loop"), "does not end"),
    "a chat that the template counts too far": (chat("count"), "template refuses"),
    "a text over the context": ({"prompt": "word " * 200_000}, "context window"),
    "resumed from no token": ({"resume_token_ids": (2**40,)}, "There is no token"),
    "resumed past the context": ({"resume_token_ids": (5,) * 9000}, "in 90[0-9]+ tokens"),
    "a temperature that is no number": (sampling(temperature=math.nan), "temperature must be"),
    "an endless temperature": (sampling(temperature=math.inf), "temperature must be"),
    "a temperature in words": (sampling(temperature="hot"), "must be numbers"),
    "half a token more": (sampling(max_tokens=8.5), "max_tokens must be a whole number"),
    "half a likeliest token": (sampling(top_k=0.5), "top_k must be a whole number"),
    "a stop string of bytes": (sampling(stop=(b"x",)), "must be text"),
    "a bias in words": (sampling(logit_bias={5: "much"}), "A bias must be a number"),
    "tokens without end": (sampling(max_tokens=2**70), "cannot be taken"),
    "a negative top_p": (sampling(top_p=-1.0), "top_p must be"),
    "a hundred thousand answers": (sampling(n=10**5), "answers to a prompt"),
    "tokens below zero": (sampling(max_tokens=-1), "max_tokens is negative"),
    "a role that is none": ({"prompt": (ChatMessage("ruler", "x"),)}, "There is no role"),
    "a schema that is none": (schema({"type": "nothing"}), "nothing"),
    "a schema that refers to nothing": (schema({"$ref": "#/$defs/x"}), ""),
    "a schema bomb": (
        schema({"type": "object", "properties": {f"p{i}": nested(30) for i in range(100)}}),
        "",
    ),
    "a schema without a bottom": (
        {
            "constraint": Constraint(
                ConstraintKind.JSON_SCHEMA, '{"properties":{"a":' * 9000 + "{}" + "}}" * 9000
            )
        },
        "",
    ),
    "a schema that counts too far": (
        schema({"type": "string", "minLength": 10**9, "maxLength": 10**9}),
        "",
    ),
    "a regex that is none": (regex("(a"), ""),
    "a regex bomb": (regex("((((a{1,500}){1,500}){1,500}){1,500})"), ""),
    "a regex of alternatives": (regex("(.*a){40}" + "b" * 1000 + "(x+x+)+y{10000}"), ""),
    "a grammar that never ends": (
        {"constraint": Constraint(ConstraintKind.LARK, "start: start start")},
        "",
    ),
    "a grammar over size": (
        {"constraint": Constraint(ConstraintKind.LARK, "x" * 10**6)},
        "characters",
    ),
    "a tool without a schema": (tool("[]"), "no JSON schema"),
    "a tool whose schema is a bomb": (tool("[" * 10**5), "no JSON schema"),
    "a tool with half a character": (
        tool('{"properties": {"a": {"const": "\\ud800"}}, "required": ["a"]}'),
        "",
    ),
    "an earlier call with half a character": (called('{"a": "\\ud800"}'), ""),
    "an earlier call that is endless": (called("[" * 10**5), ""),
    "a tool with a name from hell": (tool("{}", name='"}}\n%}'), "no name for a tool"),
}
MAY_BE_ANSWERED = {
    "a schema bomb",
    "a schema that counts too far",
    "a schema without a bottom",
    "a regex bomb",
    "a regex of alternatives",
    "a grammar that never ends",
    "a tool with half a character",
    "an earlier call with half a character",
    "an earlier call that is endless",
}
"""Where the grammar's compiler may find a way: then the answer is short and right."""


ANSWERED = "answered: "


@pytest.fixture(scope="module")
def folder() -> Path:
    return installed("smollm2:135m").folder


@pytest.fixture
def mischievous(folder, tmp_path) -> Path:
    where = tmp_path / "mischievous"
    shutil.copytree(folder, where, copy_function=os.symlink)
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(folder).chat_template
    (where / "chat_template.jinja").unlink(missing_ok=True)
    (where / "chat_template.jinja").write_text(MISCHIEF + template)
    return where


def is_right(name: str, heard: str) -> bool:
    if heard.startswith(ANSWERED):
        return name in MAY_BE_ANSWERED
    return re.search(BAD[name][1], heard) is not None and len(heard) < 500


async def said(engine, request) -> list:
    async with engine.generate(request) as events:
        return [event async for event in events]


def text_of(events) -> str:
    return "".join(event.text for event in events)


async def heard_of(engine, name: str) -> tuple[str, float]:
    """What is said to one of these, and the seconds until then."""
    bad = replace(GenerationRequest(name, HELLO, FINE), **BAD[name][0])
    began = trio.current_time()
    try:
        events = await said(engine, bad)
        heard = events[-1].error or f"{ANSWERED}{text_of(events)}"
    except PromptRefused as exc:
        heard = str(exc)
    except EngineBusy:  # with the constraint before it, which was given up
        await trio.sleep(0.1)
        return await heard_of(engine, name)
    return heard, trio.current_time() - began


async def test_each_is_refused_alone_at_once_and_its_mates_hear_nothing_of_it(mischievous):
    mate = GenerationRequest("mate", (ChatMessage("user", "Tell me a story."),), FINE)
    mate = replace(mate, sampling=replace(FINE, max_tokens=100))
    heard: dict[str, str] = {}
    slow: dict[str, float] = {}
    config = EngineConfig(model=mischievous, device="cpu", threads=1, context_window=1024)
    async with open_engine(config) as engine:
        await engine.wait_ready()
        alone = text_of(await said(engine, mate))
        stories: list[str] = []
        told = trio.Event()
        async with trio.open_nursery() as nursery:

            async def keep_telling():
                while True:
                    stories.append(text_of(await said(engine, mate)))
                    told.set()

            nursery.start_soon(keep_telling)
            for name in BAD:
                heard[name], seconds = await heard_of(engine, name)
                if not heard[name].startswith(ANSWERED):
                    slow[name] = seconds
            for name in [name for name, seconds in slow.items() if seconds >= 1]:
                # The machine may have been busy with something else; not three times.
                slow[name] = min([(await heard_of(engine, name))[1] for _ in range(2)])
            endless = replace(FINE, max_tokens=2**62)
            events = await said(engine, GenerationRequest("endless", (5,) * 1000, endless))
            assert events[-1].finish_reason is FinishReason.LENGTH
            assert sum(len(event.token_ids) for event in events) == 24
            await told.wait()
            nursery.cancel_scope.cancel()
        wrong = {name: each for name, each in heard.items() if not is_right(name, each)}
        assert not wrong
        assert not {name: seconds for name, seconds in slow.items() if seconds >= 1}
        assert set(stories) == {alone}
        assert engine.statistics().restarts == 0
        with trio.fail_after(5):
            while engine.statistics().running:  # noqa: ASYNC110 - another process frees it
                await trio.sleep(0.01)


async def test_a_client_that_never_reads_holds_up_nobody(folder):
    endless = replace(FINE, max_tokens=600)
    config = EngineConfig(model=folder, device="cpu", threads=1, max_running=4, max_queued=1)
    async with open_engine(config) as engine:
        await engine.wait_ready()
        asked = GenerationRequest("reads", (ChatMessage("user", "Tell me a story."),), FINE)
        alone = text_of(await said(engine, asked))
        async with (
            engine.generate(GenerationRequest("a", HELLO, endless)) as first,
            engine.generate(GenerationRequest("b", HELLO, endless)),
            engine.generate(GenerationRequest("c", HELLO, endless)),
        ):
            await anext(aiter(first))
            for _ in range(2):
                assert text_of(await said(engine, asked)) == alone
            async with (
                engine.generate(GenerationRequest("d", HELLO, endless)),
                engine.generate(GenerationRequest("e", HELLO, endless)),
            ):
                with pytest.raises(EngineBusy):
                    await said(engine, asked)
        with trio.fail_after(5):
            while engine.statistics().running:  # noqa: ASYNC110 - another process frees it
                await trio.sleep(0.01)
        assert text_of(await said(engine, asked)) == alone


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def scrambled(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(os.urandom(4096))


def of_another_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "imagined", "architectures": ["ImaginedForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


DAMAGE = {
    truncated: "ends|short|truncated|bytes",
    scrambled: "header|safetensors",
    of_another_kind: "imagined|Imagined",
    of_another_size: "shape|size|config",
    without_a_tokenizer: "tokenizer",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
async def test_a_model_that_cannot_be_run_says_why(folder, tmp_path, damage):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    damage(broken)
    async with open_engine(EngineConfig(model=broken, device="cpu")) as engine:
        with pytest.raises(EngineDead, match=DAMAGE[damage]) as caught, trio.fail_after(60):
            await engine.wait_ready()
    assert "Traceback" not in str(caught.value)


def test_a_node_with_such_a_model_ends_with_the_reason(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    truncated(broken)
    command = [sys.executable, "-m", "pinaivu_node.cli", "start", "--model", str(broken)]
    command += ["--home", str(tmp_path / "home"), "--models-folder", str(tmp_path / "models")]
    command += ["--coordinator", f"/ip4/127.0.0.1/tcp/1/p2p/12D3KooW{'A' * 44}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "model.safetensors is truncated" in ended.stderr
    assert "Traceback" not in ended.stderr
