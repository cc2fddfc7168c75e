//! Every refusal: its status, the field it names, and that it harms nobody.

use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use serde_json::{Value, json};

use super::support::{Server, chat, completion, keys, post};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

async fn refused(server: &Server, path: &str, body: &Value, status: StatusCode, param: Option<&str>) {
    let answer = server.post(path, body).await;
    let short: String = body.to_string().chars().take(300).collect();
    assert_eq!(answer.status, status, "{short}: {}", answer.text);
    let error = &answer.json()["error"];
    assert_eq!(keys(error), ["message", "type", "param", "code"], "{short}");
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()));
    assert_eq!(error["param"].as_str(), param, "{short}: {}", answer.text);
}

#[tokio::test]
async fn wrong_values_are_400_and_name_the_field() {
    let server = Server::start("").await;
    let cases: &[(&str, Value)] = &[
        ("temperature", json!(-1)),
        ("temperature", json!(1e308)),
        ("temperature", json!("NaN")),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(2)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(9_223_372_036_854_775_808_u64)),
        ("max_tokens", json!("5")),
        ("min_tokens", json!(100)),
        ("n", json!(0)),
        ("n", json!(129)),
        ("n", json!(-3)),
        ("seed", json!(9_223_372_036_854_775_808_u64)),
        ("seed", json!(0.5)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("repetition_penalty", json!(0)),
        ("logit_bias", json!({ "x": 1 })),
        ("logit_bias", json!({ "1": 1000 })),
        ("logit_bias", json!({ "99999999": 1 })),
        ("stop", json!([""])),
        ("stop", json!(vec!["x"; 65])),
        ("stop", json!("x".repeat(1025))),
        ("stop", json!(5)),
        ("stop_token_ids", json!([99_999_999])),
        ("allowed_token_ids", json!([])),
        ("bad_words", json!([""])),
        ("prompt_logprobs", json!(21)),
        ("stream", json!("yes")),
        ("stream_options", json!({ "include_usage": true })),
        ("truncate_prompt_tokens", json!(0)),
        ("priority", json!(1)),
        ("cache_salt", json!("")),
        ("request_id", json!("a b")),
        ("spaces_between_special_tokens", json!(false)),
    ];
    for (field, value) in cases {
        for (path, mut body) in [(CHAT, chat(4)), (COMPLETIONS, completion(json!("a"), 4))] {
            body[*field] = value.clone();
            refused(&server, path, &body, StatusCode::BAD_REQUEST, Some(field)).await;
        }
    }
    server.idle().await;
    server.stop();
}

#[tokio::test]
async fn chats_are_checked_down_to_the_message() {
    let server = Server::start("").await;
    let cases: &[(&str, &str, Value)] = &[
        ("messages", "messages", json!([])),
        ("messages", "messages", json!("hello")),
        ("messages", "messages", Value::Null),
        ("messages[0]", "messages", json!([3])),
        ("messages[0].role", "messages", json!([{ "content": "x" }])),
        (
            "messages[1].content",
            "messages",
            json!([{ "role": "user", "content": "x" }, { "role": "user", "content": 3 }]),
        ),
        (
            "messages[0].content[0]",
            "messages",
            json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "x" } }] }]),
        ),
        ("top_logprobs", "top_logprobs", json!(3)),
        ("tools", "tools", json!([{ "type": "function", "function": { "name": "f" } }])),
        ("tool_choice", "tool_choice", json!("required")),
        ("chat_template", "chat_template", json!("{{ messages }}")),
        ("max_completion_tokens", "max_completion_tokens", json!(-1)),
    ];
    for (param, field, value) in cases {
        let mut body = chat(4);
        body[*field] = value.clone();
        refused(&server, CHAT, &body, StatusCode::BAD_REQUEST, Some(param)).await;
    }
    let mut body = chat(4);
    body["logprobs"] = json!(true);
    body["top_logprobs"] = json!(21);
    refused(&server, CHAT, &body, StatusCode::BAD_REQUEST, Some("top_logprobs")).await;
    server.stop();
}

#[tokio::test]
async fn completions_are_checked_down_to_the_prompt() {
    let server = Server::start("").await;
    let cases: &[(&str, &str, Value)] = &[
        ("prompt", "prompt", Value::Null),
        ("prompt", "prompt", json!([])),
        ("prompt", "prompt", json!([[]])),
        ("prompt", "prompt", json!([99_999_999])),
        ("prompt", "prompt", json!({})),
        ("prompt[1]", "prompt", json!(["a", 1])),
        ("prompt", "prompt", json!(vec!["a"; 1025])),
        ("logprobs", "logprobs", json!(21)),
        ("logprobs", "logprobs", json!(true)),
        ("best_of", "best_of", json!(0)),
        ("best_of", "best_of", json!(129)),
        ("suffix", "suffix", json!("end")),
    ];
    for (param, field, value) in cases {
        let mut body = completion(json!("a"), 4);
        body[*field] = value.clone();
        let answer = server.post(COMPLETIONS, &body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{field}: {}", answer.text);
        let got = answer.json()["error"]["param"].as_str().unwrap_or_default().to_owned();
        assert!(got == *param || got == *field, "{field} {value}: {}", answer.text);
    }
    let mut body = completion(json!(vec!["a"; 1000]), 4);
    body["n"] = json!(2);
    refused(&server, COMPLETIONS, &body, StatusCode::BAD_REQUEST, Some("n")).await;
    for (field, value) in [
        ("stop", json!("x")),
        ("logit_bias", json!({ "5": 1 })),
        ("best_of", json!(3)),
        ("structured_outputs", json!({ "regex": "a" })),
    ] {
        let mut body = completion(json!("a"), 4);
        (body["use_beam_search"], body["n"]) = (json!(true), json!(2));
        body[field] = value;
        refused(&server, COMPLETIONS, &body, StatusCode::BAD_REQUEST, Some(field)).await;
    }
    let mut body = completion(json!("a"), 4);
    (body["best_of"], body["stream"]) = (json!(2), json!(true));
    refused(&server, COMPLETIONS, &body, StatusCode::BAD_REQUEST, Some("best_of")).await;
    server.stop();
}

#[tokio::test]
async fn what_is_not_done_is_refused_and_what_asks_for_nothing_is_accepted() {
    let server = Server::start("").await;
    let cases: &[(&str, &[Value], Value)] = &[
        ("response_format", &[json!("json"), json!(1)], json!({ "type": "text" })),
        ("structured_outputs", &[json!({ "regex": "a", "choice": ["a"] })], json!({})),
        ("reasoning_effort", &[json!("high")], json!("none")),
        ("thinking_token_budget", &[json!(1)], Value::Null),
        ("length_penalty", &[json!(0.5)], json!(1.0)),
        ("store", &[json!(true)], json!(false)),
        ("service_tier", &[json!("priority")], json!("auto")),
        ("kv_transfer_params", &[json!({ "do_remote_decode": true })], json!({})),
        ("functions", &[json!([{ "name": "f" }])], json!([])),
        ("function_call", &[json!("auto")], json!("none")),
        ("stream_interval", &[json!(4)], json!(1)),
        ("user", &[json!(4)], json!("me")),
        ("metadata", &[json!("x")], json!({ "a": "b" })),
        ("no_such_field", &[json!(1), Value::Null], Value::Null),
    ];
    for (field, asks, idle) in cases {
        for ask in *asks {
            let mut body = chat(1);
            body[*field] = ask.clone();
            refused(&server, CHAT, &body, StatusCode::BAD_REQUEST, Some(field)).await;
        }
        let mut body = chat(1);
        body[*field] = idle.clone();
        if *field != "no_such_field" {
            server.ok(CHAT, body).await;
        }
    }
    let mut body = chat(1);
    body["tools"] = json!([{ "type": "function", "function": { "name": "f" } }]);
    body["tool_choice"] = json!("none");
    body["parallel_tool_calls"] = json!(true);
    server.ok(CHAT, body).await;
    server.stop();
}

#[tokio::test]
async fn broken_bodies_are_400_whatever_is_broken() {
    let server = Server::start("").await;
    let deep = format!("{{\"messages\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let wide = format!("{{\"prompt\":[{}1]}}", "1,".repeat(1_000_000));
    let bodies: Vec<(&str, Vec<u8>)> = vec![
        (CHAT, b"".to_vec()),
        (CHAT, b"{".to_vec()),
        (CHAT, b"[]".to_vec()),
        (CHAT, b"null".to_vec()),
        (CHAT, b"{} trailing".to_vec()),
        (CHAT, b"{\"temperature\": NaN}".to_vec()),
        (CHAT, b"{\"temperature\": 1e999}".to_vec()),
        (CHAT, b"{\"n\": 1, \"n\": 2}".to_vec()),
        (CHAT, b"{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\xfe\"}]}".to_vec()),
        (CHAT, b"{\"messages\": [{\"role\": \"user\", \"content\": \"\\ud800\"}]}".to_vec()),
        (CHAT, deep.into_bytes()),
        (COMPLETIONS, wide.into_bytes()),
    ];
    for (path, body) in bodies {
        let start = String::from_utf8_lossy(&body[..body.len().min(40)]).into_owned();
        let answer = server.post_text(path, body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{start}: {}", answer.text);
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error", "{start}");
    }
    server.ok(CHAT, chat(1)).await;
    server.stop();
}

#[tokio::test]
async fn a_prompt_beyond_the_context_is_400_with_the_numbers() {
    let server = Server::start("--max-model-len 32").await;
    let long = completion(json!(vec![5; 40]), 4);
    refused(&server, COMPLETIONS, &long, StatusCode::BAD_REQUEST, Some("prompt")).await;
    let answer = server.post(COMPLETIONS, &completion(json!(vec![5; 20]), 13)).await;
    let error = answer.json()["error"].clone();
    assert_eq!(error["code"], "context_length_exceeded");
    for number in ["32", "20", "13"] {
        assert!(error["message"].as_str().unwrap().contains(number), "{error}");
    }
    server.ok(COMPLETIONS, completion(json!(vec![5; 20]), 12)).await;
    let mut cut = completion(json!(vec![5; 40]), 4);
    cut["truncate_prompt_tokens"] = json!(-1);
    assert_eq!(server.ok(COMPLETIONS, cut.clone()).await["usage"]["prompt_tokens"], 28);
    cut["truncate_prompt_tokens"] = json!(10);
    assert_eq!(server.ok(COMPLETIONS, cut).await["usage"]["prompt_tokens"], 10);
    server.stop();
}

#[tokio::test]
async fn addresses_methods_and_media_types_have_their_statuses() {
    let server = Server::start("--max-body-bytes 1000").await;
    let nowhere = server.get("/v1/nowhere").await;
    assert_eq!(nowhere.status, StatusCode::NOT_FOUND);
    assert_eq!(keys(&nowhere.json()["error"]), ["message", "type", "param", "code"]);
    let wrong = server.get(CHAT).await;
    assert_eq!(wrong.status, StatusCode::METHOD_NOT_ALLOWED);
    assert!(wrong.json()["error"]["message"].as_str().unwrap().contains("GET"));
    let mut form = post(CHAT, chat(1).to_string());
    form.headers_mut().insert(header::CONTENT_TYPE, "application/x-www-form-urlencoded".parse().unwrap());
    assert_eq!(server.answer(form).await.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let bare = Request::builder().method(Method::POST).uri(CHAT).body(Body::from("{}")).unwrap();
    assert_eq!(server.answer(bare).await.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let large = server.post_text(CHAT, "x".repeat(1001)).await;
    assert_eq!(large.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(large.json()["error"]["message"].as_str().unwrap().contains("1000"));
    // The same when the length is not announced.
    let pieces = futures_util::stream::iter((0..20).map(|_| Ok::<_, std::io::Error>("x".repeat(100))));
    let streamed = server.post_text(CHAT, Body::from_stream(pieces)).await;
    assert_eq!(streamed.status, StatusCode::PAYLOAD_TOO_LARGE);
    server.stop();
}

#[tokio::test]
async fn an_unknown_model_is_404() {
    let server = Server::start("").await;
    for (path, mut body) in
        [(CHAT, chat(1)), (COMPLETIONS, completion(json!("a"), 1)), ("/tokenize", json!({ "prompt": "a" }))]
    {
        body["model"] = json!("gpt-9");
        let answer = server.post(path, &body).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}");
        assert_eq!(answer.json()["error"]["code"], "model_not_found");
    }
    server.stop();
}

#[tokio::test]
async fn keys_guard_the_api_and_leave_probes_open() {
    let server = Server::start("--api-key secret other").await;
    let with = |mut request: Request<Body>, key: &str| {
        request.headers_mut().insert(header::AUTHORIZATION, key.parse().unwrap());
        request
    };
    let ask = || post(CHAT, chat(1).to_string());
    let refused = server.answer(ask()).await;
    assert_eq!(refused.status, StatusCode::UNAUTHORIZED);
    assert_eq!(refused.json()["error"]["code"], "invalid_api_key");
    assert_eq!(refused.headers[header::WWW_AUTHENTICATE], "Bearer");
    assert_eq!(server.answer(with(ask(), "Bearer wrong")).await.status, StatusCode::UNAUTHORIZED);
    for key in ["Bearer secret", "Bearer other"] {
        assert_eq!(server.answer(with(ask(), key)).await.status, StatusCode::OK);
    }
    for path in ["/v1/models", "/debug/state"] {
        assert_eq!(server.get(path).await.status, StatusCode::UNAUTHORIZED, "{path}");
    }
    for path in
        ["/health", "/livez", "/readyz", "/startupz", "/ping", "/metrics", "/version", "/load", "/", "/docs"]
    {
        assert_eq!(server.get(path).await.status, StatusCode::OK, "{path}");
    }
    assert_eq!(server.post("/ping", &json!({})).await.status, StatusCode::OK);
    server.stop();
}
