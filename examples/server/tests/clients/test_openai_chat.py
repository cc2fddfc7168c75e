"""The openai package: chat completions."""

import math

import openai


def test_models_are_listed(client, server):
    served = client.models.list().data
    assert [each.id for each in served] == [server.model["id"]]
    assert served[0].object == "model"


def test_an_answer_has_words_usage_and_a_reason(say, model):
    answer = say()
    assert answer.object == "chat.completion"
    assert answer.model == model
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content.strip()
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 40


def test_a_length_is_kept(say):
    answer = say(max_tokens=7, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 7


def test_the_newer_name_of_the_length_works(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Who comes here?"}],
        max_completion_tokens=5,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage.completion_tokens == 5


def test_a_stream_says_the_same_as_an_answer(say):
    whole = say()
    chunks = list(say(stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    words = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert words == whole.choices[0].message.content
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_without_the_option_has_no_usage(say):
    assert all(chunk.usage is None and chunk.choices for chunk in say(stream=True))


def test_the_stream_helper_of_the_package_works(client, model):
    messages = [{"role": "user", "content": "Speak to me of the king."}]
    with client.chat.completions.stream(model=model, messages=messages, max_tokens=300, temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta"} <= kinds
    assert final.choices[0].message.content


def test_logprobs_belong_to_the_words(say):
    answer = say(logprobs=True, top_logprobs=3, max_tokens=12, extra_body={"ignore_eos": True})
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        ranked = [each.logprob for each in entry.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
        assert sum(map(math.exp, ranked)) <= 1.001
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
    plain = say(logprobs=True, max_tokens=12)
    spelled = b"".join(bytes(entry.bytes) for entry in plain.choices[0].logprobs.content).decode()
    assert spelled.startswith(plain.choices[0].message.content)


def test_a_stream_has_the_same_logprobs(say):
    whole = say(logprobs=True, top_logprobs=2)
    entries = [
        entry
        for chunk in say(logprobs=True, top_logprobs=2, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for entry in choice.logprobs.content
    ]
    assert entries == whole.choices[0].logprobs.content


def test_several_answers_to_one_prompt(say):
    answer = say(n=4, temperature=1.2, seed=3, max_tokens=24)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.message.content for choice in answer.choices}) > 1
    chunks = list(say(n=4, temperature=1.2, seed=3, max_tokens=24, stream=True))
    for choice in answer.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content


def test_the_text_ends_before_a_stop_string(say):
    whole = say(max_tokens=30, extra_body={"ignore_eos": True}).choices[0].message.content
    word = whole.split()[4]
    stopped = say(max_tokens=30, stop=[word, "never said"], extra_body={"ignore_eos": True}).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == whole[: whole.index(word)]
    streamed = say(max_tokens=30, stop=word, stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == stopped.message.content


def test_a_seed_repeats_an_answer(say):
    words = lambda seed: say(temperature=1.0, seed=seed).choices[0].message.content
    assert words(7) == words(7)
    assert len({words(seed) for seed in range(6)}) > 1


def test_a_bias_forbids_a_token(say, server):
    first = say(logprobs=True, max_tokens=1).choices[0].logprobs.content[0].token
    banned = server.post("/tokenize", {"prompt": first, "add_special_tokens": False})["tokens"]
    other = say(logprobs=True, max_tokens=1, logit_bias={str(token): -100 for token in banned})
    assert other.choices[0].logprobs.content[0].token != first


def test_a_conversation_is_a_scene(server):
    """The bundled model's template: names become speakers, roles have default ones, the assistant speaks next."""
    messages = [
        {"role": "system", "content": "Two households, both alike in dignity."},
        {"role": "user", "content": "Where is my lady?", "name": "Nurse"},
        {"role": "assistant", "content": "Here."},
        {"role": "user", "content": [{"type": "text", "text": "Madam!"}]},
    ]
    tokens = server.post("/tokenize", {"messages": messages})["tokens"]
    scene = server.post("/detokenize", {"tokens": tokens})["prompt"].replace("<|begin|>", "").replace("<|end|>", "")
    speakers = [speech.partition(":\n")[0] for speech in scene.split("\n\n")]
    assert speakers == ["Chorus", "Nurse", "JULIET", "ROMEO", "JULIET"]


def test_a_repeated_prompt_is_cached(say):
    words = "Once more, and for the last time, I ask of thee: " + "who goes there? " * 12
    first, second = say(words, max_tokens=4), say(words, max_tokens=4)
    assert second.usage.prompt_tokens_details.cached_tokens > 0
    assert second.choices[0].message.content == first.choices[0].message.content


def test_headers_are_there_for_the_raw_client(client, model):
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": "Ho!"}], max_tokens=2
    )
    assert raw.status_code == 200
    assert raw.headers["content-type"].startswith("application/json")
    assert isinstance(raw.parse(), openai.types.chat.ChatCompletion)
