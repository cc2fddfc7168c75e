//! The shapes of answers, field by field.

use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use serde_json::{Value, json};

use super::support::{Server, chat, completion, keys, post};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn a_chat_completion_has_openai_s_fields() {
    let server = Server::start("").await;
    let answer = server.ok(CHAT, chat(5)).await;
    assert_eq!(keys(&answer), ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"]);
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], server.app.names[0]);
    assert!(answer["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
    let choice = &answer["choices"][0];
    assert_eq!(keys(choice), ["index", "message", "logprobs", "finish_reason", "stop_reason"]);
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"]["content"].is_string());
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("length"), &Value::Null));
    let usage = &answer["usage"];
    assert_eq!(keys(usage), ["prompt_tokens", "completion_tokens", "total_tokens"]);
    assert_eq!(usage["completion_tokens"], 5);
    let sum = usage["prompt_tokens"].as_u64().unwrap() + 5;
    assert_eq!(usage["total_tokens"], sum);
    server.stop();
}

#[tokio::test]
async fn a_completion_has_openai_s_fields() {
    let server = Server::start("").await;
    let answer = server.ok(COMPLETIONS, completion(json!("ROMEO:"), 5)).await;
    assert_eq!(keys(&answer), ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"]);
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(answer["object"], "text_completion");
    let choice = &answer["choices"][0];
    assert_eq!(keys(choice), ["index", "text", "logprobs", "finish_reason", "stop_reason"]);
    assert_eq!(choice["finish_reason"], "length");
    server.stop();
}

#[tokio::test]
async fn chat_logprobs_come_per_token_with_bytes_and_alternatives() {
    let server = Server::start("").await;
    let mut body = chat(3);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(2);
    let answer = server.ok(CHAT, body.clone()).await;
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(tokens.len(), 3);
    for token in &tokens {
        assert_eq!(keys(token), ["token", "logprob", "bytes", "top_logprobs"]);
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        // Greedy: the chosen token is the most likely one.
        assert_eq!(top[0]["token"], token["token"]);
        assert!(top[0]["logprob"].as_f64() >= top[1]["logprob"].as_f64());
    }
    let chunks = server.chunks(CHAT, body.clone()).await;
    let streamed: Vec<&Value> = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array().unwrap())
        .collect();
    assert_eq!(streamed, tokens.iter().collect::<Vec<_>>());
    body["return_tokens_as_token_ids"] = json!(true);
    let answer = server.ok(CHAT, body).await;
    let token = &answer["choices"][0]["logprobs"]["content"][0]["token"];
    assert!(token.as_str().unwrap().starts_with("token_id:"), "{token}");
    server.stop();
}

#[tokio::test]
async fn completion_logprobs_are_four_lists_and_echo_scores_the_prompt() {
    let server = Server::start("").await;
    let mut body = completion(json!("ROMEO: speak"), 2);
    body["logprobs"] = json!(1);
    let plain = server.ok(COMPLETIONS, body.clone()).await;
    let lists = &plain["choices"][0]["logprobs"];
    assert_eq!(keys(lists), ["text_offset", "token_logprobs", "tokens", "top_logprobs"]);
    for list in lists.as_object().unwrap().values() {
        assert_eq!(list.as_array().unwrap().len(), 2);
    }
    assert_eq!(lists["text_offset"][0], 0);

    body["echo"] = json!(true);
    let echoed = server.ok(COMPLETIONS, body.clone()).await;
    let choice = &echoed["choices"][0];
    let answer = plain["choices"][0]["text"].as_str().unwrap();
    assert_eq!(choice["text"], format!("ROMEO: speak{answer}"));
    let lists = &choice["logprobs"];
    let prompt_tokens = usize::try_from(echoed["usage"]["prompt_tokens"].as_u64().unwrap()).unwrap();
    let scores = lists["token_logprobs"].as_array().unwrap();
    assert_eq!(scores.len(), prompt_tokens + 2);
    assert!(scores[0].is_null() && scores[1..].iter().all(Value::is_number), "{scores:?}");
    let whole: String = lists["tokens"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(whole.ends_with(answer), "{whole:?}");

    // lm-eval's way to score a text.
    body["max_tokens"] = json!(0);
    let scored = server.ok(COMPLETIONS, body).await;
    let choice = &scored["choices"][0];
    assert_eq!(choice["text"], "ROMEO: speak");
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().len(), prompt_tokens);
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    server.stop();
}

#[tokio::test]
async fn the_four_shapes_of_a_prompt_are_one_and_the_same_prompt() {
    let server = Server::start("").await;
    let text = "ROMEO: speak";
    let tokens = server.ok("/tokenize", json!({ "prompt": text })).await["tokens"].clone();
    let mut texts = Vec::new();
    for prompt in [json!(text), json!([text]), tokens.clone(), json!([tokens])] {
        let answer = server.ok(COMPLETIONS, completion(prompt, 4)).await;
        texts.push(answer["choices"][0]["text"].clone());
    }
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
    let two = server.ok(COMPLETIONS, completion(json!([text, "JULIET: O"]), 4)).await;
    assert_eq!(two["choices"].as_array().unwrap().len(), 2);
    assert_eq!(two["choices"][0]["text"], texts[0]);
    assert_eq!(two["choices"][1]["index"], 1);
    server.stop();
}

#[tokio::test]
async fn n_answers_share_a_prompt_and_differ_by_their_seed() {
    let server = Server::start("--enable-prompt-tokens-details").await;
    let mut body = completion(json!(["ROMEO:", "JULIET:"]), 8);
    body["temperature"] = json!(1);
    body["n"] = json!(3);
    body["seed"] = json!(7);
    let answer = server.ok(COMPLETIONS, body.clone()).await;
    let texts = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap();
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(texts(&answer).len(), 6);
    assert_eq!(answer["usage"]["completion_tokens"], 6 * 8);
    assert_ne!(texts(&answer)[0], texts(&answer)[1]);
    let again = server.ok(COMPLETIONS, body).await;
    assert_eq!(texts(&answer), texts(&again), "a seed repeats");
    assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].is_u64());
    server.stop();
}

#[tokio::test]
async fn the_best_of_several_are_those_with_the_likeliest_tokens() {
    let server = Server::start("").await;
    let mut body = completion(json!(["ROMEO:\n", "JULIET:\n"]), 8);
    (body["temperature"], body["seed"], body["n"]) = (json!(1.0), json!(7), json!(5));
    (body["logprobs"], body["logit_bias"]) = (json!(0), json!({}));
    let all = server.ok(COMPLETIONS, body.clone()).await;
    let mean = |choice: &Value| {
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        logprobs.iter().map(|one| one.as_f64().unwrap()).sum::<f64>() / logprobs.len() as f64
    };
    let mut expected = Vec::new();
    for answers in all["choices"].as_array().unwrap().chunks(5) {
        let mut ranked: Vec<&Value> = answers.iter().collect();
        ranked.sort_by(|one, other| mean(other).total_cmp(&mean(one)));
        expected.extend(ranked[..2].iter().map(|choice| choice["text"].clone()));
    }
    (body["n"], body["best_of"], body["logprobs"]) = (json!(2), json!(5), Value::Null);
    let best = server.ok(COMPLETIONS, body).await;
    let choices = best["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|choice| choice["text"].clone()).collect::<Vec<_>>(), expected);
    assert_eq!(choices.iter().map(|choice| choice["index"].clone()).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert!(choices.iter().all(|choice| choice["logprobs"].is_null()), "they were not asked for");
    assert_eq!(best["usage"]["completion_tokens"], 2 * 5 * 8, "all that were made are counted");
    // The engine may be about to show itself idle when the answer is here.
    let mut view = server.app.engine.view();
    let last = view.wait_for(|view| view.snapshot.running.is_empty() && view.snapshot.totals.forks >= 16);
    let last =
        tokio::time::timeout(Duration::from_secs(60), last).await.expect("prompts are forked").unwrap();
    assert_eq!(last.snapshot.totals.forks, 2 * 2 * 4, "all but the first fork the prompt");
    drop(last);
    server.stop();
}

#[tokio::test]
async fn a_beam_search_gives_the_likeliest_answers_best_first() {
    let server = Server::start("").await;
    let mut body = completion(json!(["ROMEO:\n", "JULIET:\n"]), 8);
    (body["use_beam_search"], body["n"], body["logprobs"]) = (json!(true), json!(3), json!(0));
    let found = server.ok(COMPLETIONS, body.clone()).await;
    let choices = found["choices"].as_array().unwrap();
    let sum = |choice: &Value| {
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        logprobs.iter().map(|one| one.as_f64().unwrap()).sum::<f64>()
    };
    assert_eq!(choices.iter().map(|choice| choice["index"].clone()).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
    for answers in choices.chunks(3) {
        assert!(answers.windows(2).all(|pair| sum(&pair[0]) >= sum(&pair[1])), "{answers:?}");
        assert!(answers.iter().all(|answer| answer["finish_reason"] == "length"));
    }
    assert_eq!(found["usage"]["completion_tokens"], 2 * 3 * 8);
    let mut greedy = completion(json!("ROMEO:\n"), 8);
    greedy["logprobs"] = json!(0);
    let greedy = server.ok(COMPLETIONS, greedy).await;
    assert!(sum(&choices[0]) >= sum(&greedy["choices"][0]), "a search finds no worse");

    let chunks = server.chunks(COMPLETIONS, body).await;
    assert_eq!(chunks.len(), 6, "each answer comes whole");
    for (chunk, choice) in chunks.iter().zip(choices) {
        assert_eq!(
            (&chunk["choices"][0]["text"], &chunk["choices"][0]["index"]),
            (&choice["text"], &choice["index"])
        );
    }
    let mut body = chat(6);
    (body["use_beam_search"], body["n"], body["length_penalty"]) = (json!(true), json!(2), json!(0.5));
    let answer = server.ok(CHAT, body).await;
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    server.idle().await;
    server.stop();
}

#[tokio::test]
async fn stops_end_the_text_and_are_named() {
    let server = Server::start("").await;
    let whole = server.ok(COMPLETIONS, completion(json!("ROMEO:"), 24)).await;
    let whole = whole["choices"][0]["text"].as_str().unwrap().to_owned();
    let middle: String = whole.chars().skip(6).take(4).collect();
    let mut body = completion(json!("ROMEO:"), 24);
    body["stop"] = json!([middle]);
    let stopped = server.ok(COMPLETIONS, body.clone()).await;
    let choice = &stopped["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["stop_reason"], json!(middle));
    assert_eq!(choice["text"], json!(whole[..whole.find(&middle).unwrap()]));
    body["include_stop_str_in_output"] = json!(true);
    let kept = server.ok(COMPLETIONS, body).await;
    assert!(kept["choices"][0]["text"].as_str().unwrap().ends_with(&middle));
    server.stop();
}

#[tokio::test]
async fn token_ids_and_prompt_logprobs_come_when_asked_for() {
    let server = Server::start("").await;
    let mut body = chat(2);
    body["return_token_ids"] = json!(true);
    body["prompt_logprobs"] = json!(1);
    let answer = server.ok(CHAT, body).await;
    let prompt = answer["prompt_token_ids"].as_array().unwrap();
    assert_eq!(answer["choices"][0]["token_ids"].as_array().unwrap().len(), 2);
    let scores = answer["prompt_logprobs"].as_array().unwrap();
    assert_eq!(scores.len(), prompt.len());
    assert!(scores[0].is_null());
    let entry = &scores[1][prompt[1].to_string()];
    assert_eq!(keys(entry), ["logprob", "rank", "decoded_token"]);
    server.stop();
}

#[tokio::test]
async fn chat_templates_are_steered_by_the_request() {
    let server = Server::start("").await;
    let turn = json!([
        { "role": "user", "content": [{ "type": "text", "text": "Speak" }] },
        { "role": "assistant", "content": "My lord" },
    ]);
    let open = json!({ "messages": turn, "continue_final_message": true });
    let tokens = server.ok("/tokenize", open.clone()).await["tokens"].clone();
    let text = server.ok("/detokenize", json!({ "tokens": tokens })).await["prompt"].clone();
    assert!(text.as_str().unwrap().trim_end().ends_with("My lord"), "{text}");
    let mut body = chat(3);
    body["messages"] = turn;
    body["continue_final_message"] = json!(true);
    body["echo"] = json!(true);
    let answer = server.ok(CHAT, body).await;
    assert!(answer["choices"][0]["message"]["content"].as_str().unwrap().starts_with("My lord"));
    server.stop();
}

#[tokio::test]
async fn text_survives_tokenize_and_detokenize() {
    let server = Server::start("").await;
    let text = "To be, or not to be: ümlaut 🙂";
    let answer = server
        .ok("/tokenize", json!({ "prompt": text, "add_special_tokens": false, "return_token_strs": true }))
        .await;
    assert_eq!(keys(&answer), ["count", "max_model_len", "tokens", "token_strs"]);
    assert_eq!(answer["count"], answer["tokens"].as_array().unwrap().len());
    let back = server.ok("/detokenize", json!({ "tokens": answer["tokens"] })).await;
    assert_eq!(back, json!({ "prompt": text }));
    server.stop();
}

#[tokio::test]
async fn models_are_listed_under_all_their_names() {
    let server = Server::start("--served-model-name first second").await;
    let list = server.get("/v1/models").await.json();
    assert_eq!(keys(&list), ["object", "data"]);
    let card = &list["data"][1];
    assert_eq!(keys(card), ["id", "object", "created", "owned_by", "root", "parent", "max_model_len"]);
    assert_eq!(card["id"], "second");
    assert!(card["max_model_len"].as_u64().unwrap() > 16);
    assert_eq!(server.get("/v1/models/first").await.json()["id"], "first");
    assert_eq!(server.get("/v1/models/third").await.status, StatusCode::NOT_FOUND);
    let mut body = chat(1);
    body["model"] = json!("second");
    assert_eq!(server.ok(CHAT, body).await["model"], "second");
    server.stop();
}

#[tokio::test]
async fn request_ids_travel_with_the_answer() {
    let server = Server::start("--enable-request-id-headers").await;
    let mut request = post(CHAT, chat(1).to_string());
    request.headers_mut().insert("x-request-id", "abc-1".parse().unwrap());
    let answer = server.answer(request).await;
    assert_eq!(answer.headers["x-request-id"], "abc-1");
    assert_eq!(answer.json()["id"], "chatcmpl-abc-1");
    let mut body = chat(1);
    body["request_id"] = json!("mine");
    assert_eq!(server.ok(CHAT, body).await["id"], "chatcmpl-mine");
    server.stop();
}

#[tokio::test]
async fn browsers_of_other_origins_are_answered_as_configured() {
    let server = Server::start(r#"--allowed-origins ["http://a.example"]"#).await;
    let ask = |origin: &str| {
        let builder = Request::options(CHAT).header(header::ORIGIN, origin);
        builder.header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST").body(Body::empty()).unwrap()
    };
    let allow = header::ACCESS_CONTROL_ALLOW_ORIGIN;
    assert_eq!(server.answer(ask("http://a.example")).await.headers[&allow], "http://a.example");
    assert!(!server.answer(ask("http://b.example")).await.headers.contains_key(&allow));
    server.stop();
}

#[tokio::test]
async fn a_root_path_is_served_with_and_without() {
    let server = Server::start("--root-path /llm").await;
    assert_eq!(server.get("/llm/v1/models").await.status, StatusCode::OK);
    assert_eq!(server.get("/v1/models").await.status, StatusCode::OK);
    assert_eq!(server.get("/openapi.json").await.json()["servers"][0]["url"], "/llm");
    server.stop();
}
