"""The openai package: answers that must be something."""

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

WORDS = [{"role": "user", "content": "Who comes here?"}]


class Guest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)
    side: Literal["Montague", "Capulet"]


class Feast(BaseModel):
    host: Guest
    guests: list[Guest] = Field(max_length=2)


def test_parse_gives_an_object_of_the_class(client, model):
    for seed in range(4):
        answer = client.chat.completions.parse(
            model=model, messages=WORDS, response_format=Guest, max_tokens=400, temperature=1, seed=seed
        )
        assert answer.choices[0].finish_reason == "stop"
        guest = answer.choices[0].message.parsed
        assert isinstance(guest, Guest)
        assert 0 <= guest.age <= 120


def test_the_beta_name_of_parse_takes_nested_classes(client, model):
    parse = getattr(getattr(client.beta, "chat", None), "completions", client.chat.completions).parse
    feasts = []
    for seed in range(8):
        options = {"max_tokens": 430, "temperature": 1, "seed": seed}
        try:
            answer = parse(model=model, messages=WORDS, response_format=Feast, **options)
        except openai.LengthFinishReasonError:
            continue  # The small model may indent until its tokens are spent.
        feasts.append(answer.choices[0].message.parsed)
    assert feasts and all(len(feast.guests) <= 2 for feast in feasts)


def test_a_schema_is_kept_by_every_answer_whole_and_streamed(say):
    schema = {"name": "guest", "strict": True, "schema": Guest.model_json_schema()}
    options = {"response_format": {"type": "json_schema", "json_schema": schema}, "max_tokens": 400}
    whole = say(n=3, temperature=1.2, seed=5, **options)
    for choice in whole.choices:
        Guest.model_validate_json(choice.message.content)
    chunks = list(say(n=3, temperature=1.2, seed=5, stream=True, **options))
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content


def test_any_object(say):
    choice = say(response_format={"type": "json_object"}, max_tokens=300).choices[0]
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_choices_and_expressions_go_into_the_extra_body(say):
    choices = say(extra_body={"structured_outputs": {"choice": ["yea", "nay"]}}, n=8, temperature=2).choices
    assert {choice.message.content for choice in choices} <= {"yea", "nay"}
    expression = say(extra_body={"structured_outputs": {"regex": "[0-9]{4}-[0-9]{2}"}}, temperature=2)
    year, _, month = expression.choices[0].message.content.partition("-")
    assert len(year) == 4 and len(month) == 2 and (year + month).isdigit()


def test_a_schema_that_cannot_be_kept_is_refused_by_name(say):
    schema = {"name": "x", "schema": {"type": "array", "uniqueItems": True}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refusal:
        say(response_format={"type": "json_schema", "json_schema": schema})
    assert refusal.value.param == "response_format.json_schema.schema"
