"""The openai package: what it raises is decided by our status and error object."""

import openai
import pytest

from conftest import KEY

HELLO = [{"role": "user", "content": "Hail!"}]


def create(client, model, **options):
    return client.chat.completions.create(**{"model": model, "messages": HELLO, "max_tokens": 4, **options})


@pytest.mark.parametrize("key", ["wrong", KEY + "x", KEY[:-1]])
def test_a_wrong_key_is_refused(server, model, key):
    with openai.OpenAI(base_url=server.url, api_key=key, max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as raised:
            create(stranger, model)
    assert raised.value.status_code == 401
    assert raised.value.body["message"]


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as raised:
        create(client, "no-such-model")
    assert raised.value.code == "model_not_found"
    assert "no-such-model" in raised.value.body["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("n", 0),
        ("max_tokens", -3),
        ("presence_penalty", 9),
        ("top_logprobs", 5000),
        ("stop", {"not": "a string"}),
        ("messages", "not a list"),
        ("messages", []),
        ("logit_bias", {"not a token": 1}),
        ("stream", "yes"),
    ],
)
def test_a_bad_field_is_named(client, model, field, value):
    body = {field: value}
    if field == "top_logprobs":
        body["logprobs"] = True
    with pytest.raises(openai.BadRequestError) as raised:
        create(client, model, extra_body=body)
    assert raised.value.type == "invalid_request_error"
    assert field in f"{raised.value.param} {raised.value.body['message']}"


def test_an_unknown_role_is_refused(client, model):
    with pytest.raises(openai.BadRequestError):
        create(client, model, messages=[{"role": "prompter", "content": "psst"}])


def test_what_the_engine_cannot_do_is_refused_and_never_ignored(client, model):
    for field in ("frobnicate", "best_of_all_worlds"):
        with pytest.raises(openai.BadRequestError) as raised:
            create(client, model, extra_body={field: 1})
        assert field in raised.value.body["message"]


def test_a_prompt_beyond_the_context(client, server, model):
    long = [{"role": "user", "content": "the king " * 4 * server.model["max_model_len"]}]
    with pytest.raises(openai.BadRequestError) as raised:
        create(client, model, messages=long)
    assert raised.value.code == "context_length_exceeded"
    assert str(server.model["max_model_len"]) in raised.value.body["message"]


def test_an_answer_beyond_the_context(client, server, model):
    with pytest.raises(openai.BadRequestError) as raised:
        create(client, model, max_tokens=server.model["max_model_len"])
    assert raised.value.code == "context_length_exceeded"


def test_an_unknown_address_is_not_found(client):
    with pytest.raises(openai.NotFoundError):
        client.post("/nothing-here", body={}, cast_to=object)


def test_a_token_that_does_not_exist(client, model):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=model, prompt=[0, 10_000_000], max_tokens=1)


def test_an_error_does_not_hurt_the_next_request(client, model):
    with pytest.raises(openai.BadRequestError):
        create(client, model, temperature=-1)
    assert create(client, model).choices[0].message.content is not None
