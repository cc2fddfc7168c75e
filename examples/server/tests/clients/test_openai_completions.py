"""The openai package: text completions, the older interface that load generators and evaluation tools use."""

import pytest

PROMPT = "KING RICHARD III:\nMy lord, "


@pytest.fixture
def complete(client, model):
    def complete(prompt=PROMPT, **options):
        options = {"temperature": 0, "max_tokens": 10, "extra_body": {"ignore_eos": True}, **options}
        return client.completions.create(model=model, prompt=prompt, **options)

    return complete


@pytest.fixture
def tokens(server):
    """The ids of a prompt as the server makes them, begin token included."""
    return lambda text: server.post("/tokenize", {"prompt": text})["tokens"]


def test_a_prompt_goes_on(complete):
    answer = complete()
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 10


def test_every_shape_of_prompt(complete, tokens):
    other = "ROMEO:\nO, "
    texts = [complete(each).choices[0].text for each in (PROMPT, other)]
    by_id = complete(tokens(PROMPT))
    assert by_id.choices[0].text == texts[0]
    for both in ([PROMPT, other], [tokens(PROMPT), tokens(other)]):
        answer = complete(both)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [choice.text for choice in answer.choices] == texts


def test_echo_repeats_the_prompt(complete):
    assert complete(echo=True).choices[0].text == PROMPT + complete().choices[0].text


def test_echo_with_logprobs_scores_the_prompt(complete, tokens):
    answer = complete(echo=True, logprobs=2, max_tokens=3)
    scores = answer.choices[0].logprobs
    count = len(tokens(PROMPT)) + 3
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == len(scores.text_offset) == count
    assert scores.token_logprobs[0] is None
    assert all(score <= 0 for score in scores.token_logprobs[1:])
    assert scores.text_offset == sorted(scores.text_offset)
    chosen = complete(logprobs=2, max_tokens=3).choices[0].logprobs
    assert scores.token_logprobs[-3:] == pytest.approx(chosen.token_logprobs, abs=1e-5)


def test_the_prompt_alone_can_be_scored(complete, tokens):
    answer = complete(echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == PROMPT
    assert len(answer.choices[0].logprobs.token_logprobs) == len(tokens(PROMPT))
    assert answer.usage.completion_tokens == 0


def test_a_stream_says_the_same(complete):
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == complete().choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 10


def test_several_prompts_with_several_answers(complete):
    answer = complete([PROMPT, "ROMEO:\n"], n=3, temperature=1.0, seed=5)
    assert [choice.index for choice in answer.choices] == list(range(6))


def test_tokens_come_back_as_text(server, tokens):
    text = "Thus, with a kiss — 我死 🌹."
    back = server.post("/detokenize", {"tokens": server.post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]})
    assert back["prompt"] == text
