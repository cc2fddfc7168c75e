"""The openai package: many at once, leaving in the middle, and a server that is told to end."""

import asyncio
import json

import openai
import pytest

from conftest import KEY, Server, eventually

LINES = ["Who comes here?", "Speak to me of the king.", "What news from the north?", "Where is my lady?"]


def test_leaving_a_stream_frees_its_blocks(client, server, model):
    before = server.metric("vllm:generation_tokens_total")
    answers, length = 16, 600
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me all of it."}],
        n=answers,
        max_tokens=length,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _ in range(answers + 3):
        next(stream)
    stream.close()
    eventually(server.is_idle, "the cancelled request still runs or holds blocks")
    assert server.metric("vllm:generation_tokens_total") - before < answers * length


def test_many_at_once_say_what_each_would_say_alone(server, model):
    async def ask(client, index):
        answer = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": LINES[index % len(LINES)]}],
            temperature=0.9,
            seed=index,
            max_tokens=32,
        )
        return answer.choices[0].message.content

    async def main():
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=120) as client:
            together = await asyncio.gather(*(ask(client, index) for index in range(64)))
            alone = [await ask(client, index) for index in range(0, 64, 9)]
        return together, alone

    together, alone = asyncio.run(main())
    assert together[::9][: len(alone)] == alone
    assert len(set(together)) > 32


def test_many_streams_at_once_and_half_of_them_leave(server, model):
    async def listen(client, index):
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": LINES[index % len(LINES)]}],
            max_tokens=100,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = 0
        async for chunk in stream:
            chunks += 1
            if index % 2 and chunks == 3:
                await stream.close()
                return None
            if chunk.choices and chunk.choices[0].finish_reason:
                return chunk.choices[0].finish_reason

    async def main():
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(listen(client, index) for index in range(32)))

    assert asyncio.run(main()) == ["length", None] * 16
    eventually(server.is_idle, "a request whose client left still runs")


def test_a_server_told_to_end_finishes_its_streams(tmp_path):
    server = Server(tmp_path)
    length = 700
    try:
        with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=60) as client:
            stream = client.chat.completions.create(
                model=server.model["id"],
                messages=[{"role": "user", "content": "To the end!"}],
                max_tokens=length,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            next(stream)
            server.terminate()
            rest = list(stream)
        assert [choice.finish_reason for chunk in rest for choice in chunk.choices if choice.finish_reason] == ["length"]
        assert rest[-1].usage.completion_tokens == length
    finally:
        status = server.stop()
    assert status == 0


def test_the_log_is_json_and_holds_nothing_that_was_said(tmp_path):
    secret = "Quetzalcoatl"
    server = Server(tmp_path, RUST_LOG="debug")
    try:
        with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0, timeout=60) as client:
            said = {
                "model": server.model["id"],
                "messages": [{"role": "system", "content": secret}, {"role": "user", "content": secret}],
                "max_tokens": 4,
                "stop": [secret],
                "user": secret,
            }
            client.chat.completions.create(**said)
            list(client.chat.completions.create(**said, stream=True))
            client.completions.create(model=said["model"], prompt=secret, max_tokens=4, echo=True)
            server.post("/tokenize", {"prompt": secret})
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(**said, temperature=-1)
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(**said, extra_body={secret: secret, "grammar": secret})
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(**said | {"model": secret})
    finally:
        assert server.stop() == 0
    log = server.log.read_text()
    assert secret not in log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    paths = [line["fields"].get("path") for line in lines]
    assert paths.count("/v1/chat/completions") == 5 and {"/v1/completions", "/tokenize"} <= set(paths)
