"""The langchain-openai package, as an application uses it."""

import asyncio

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

from conftest import KEY


@pytest.fixture
def chat(server, model):
    return ChatOpenAI(base_url=server.url, api_key=KEY, model=model, temperature=0, max_tokens=30, max_retries=0, timeout=60)


def test_invoke(chat):
    answer = chat.invoke("What news from the north?")
    assert isinstance(answer, AIMessage)
    assert answer.content.strip()
    assert answer.usage_metadata["output_tokens"] > 0
    assert answer.response_metadata["finish_reason"] in ("stop", "length")


def test_a_conversation(chat):
    answer = chat.invoke(
        [
            SystemMessage("A street in Verona."),
            HumanMessage("Good morrow, cousin."),
            AIMessage("Is the day so young?"),
            HumanMessage("But new struck nine."),
        ]
    )
    assert answer.content.strip()


def test_stream(chat):
    whole = chat.invoke("Who comes here?")
    chunks = list(chat.stream("Who comes here?", stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata][-1] == whole.usage_metadata


def test_batch(chat):
    lines = ["Who comes here?", "Where is my lady?", "What is the hour?"]
    assert [each.content for each in chat.batch(lines)] == [chat.invoke(line).content for line in lines]


def test_async(chat):
    async def main():
        words = [chunk.content async for chunk in chat.astream("Who comes here?")]
        return "".join(words), await chat.abatch(["Who comes here?"] * 3)

    streamed, batch = asyncio.run(main())
    assert [each.content for each in batch] == [streamed] * 3


def test_logprobs(chat):
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke("Ho!")
    entries = answer.response_metadata["logprobs"]["content"]
    assert len(entries) == answer.usage_metadata["output_tokens"]


def test_the_older_completions_class(server, model):
    plain = OpenAI(base_url=server.url, api_key=KEY, model=model, temperature=0, max_tokens=12, max_retries=0)
    assert plain.invoke("ROMEO:\n").strip()
