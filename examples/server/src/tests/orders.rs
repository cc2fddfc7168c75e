//! Who goes first: that each order of the server is that order, what it is told by keys, headers and bodies, and what
//! it says of itself.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};

use super::support::{Answer, Server, completion, post};

const COMPLETIONS: &str = "/v1/completions";

/// A request that waits, with what the order goes by.
struct Waiting {
    name: &'static str,
    headers: &'static [(&'static str, &'static str)],
    body: Value,
}

fn waiting(name: &'static str, body: Value) -> Waiting {
    Waiting { name, headers: &[], body }
}

fn request(waiting: &Waiting, tokens: u32) -> Request<Body> {
    let mut body = completion(json!("To be"), tokens);
    body["request_id"] = json!(waiting.name);
    body.as_object_mut().unwrap().extend(waiting.body.as_object().unwrap().clone());
    let mut request = post(COMPLETIONS, body.to_string());
    for &(name, value) in waiting.headers {
        request.headers_mut().insert(name, value.parse().unwrap());
    }
    request
}

/// How it stands; 404 once it has ended.
async fn look(server: &Server, name: &str) -> Answer {
    let request =
        Request::get(format!("/debug/requests/cmpl-{name}")).header("authorization", "Bearer sk-open");
    server.answer(request.body(Body::empty()).unwrap()).await
}

/// Lets them all wait behind one that runs, then run one by one. Returns who ended when, and what was said of each
/// while it waited.
async fn race(server: &Server, all: &[Waiting]) -> (Vec<&'static str>, Vec<Value>) {
    server.app.engine.allow(Some(0));
    let mut runs: Vec<_> = Vec::new();
    for one in all {
        let (router, request) = (server.router.clone(), request(one, 2));
        runs.push(tokio::spawn(async move {
            let answer = tower::ServiceExt::oneshot(router, request).await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK);
        }));
        // It is in the line before the next one comes.
        while look(server, one.name).await.status != StatusCode::OK {
            tokio::task::yield_now().await;
        }
    }
    let mut said = Vec::new();
    for one in all {
        said.push(look(server, one.name).await.json()["choices"][0].take());
    }
    let mut left: Vec<&'static str> = all.iter().map(|one| one.name).collect();
    let mut ended = Vec::new();
    let mut steps = 0;
    while !left.is_empty() {
        server.app.engine.allow(Some(1));
        steps += 1;
        assert!(steps < 1000, "{left:?} do not end");
        let mut still = Vec::new();
        for name in left {
            match look(server, name).await.status {
                StatusCode::OK => still.push(name),
                _ => ended.push(name),
            }
        }
        left = still;
    }
    for run in runs {
        run.await.unwrap();
    }
    server.app.engine.allow(None);
    (ended, said)
}

const ALONE: &str = "--max-num-seqs 1";

#[tokio::test]
async fn first_come_is_first_served() {
    let server = Server::start(ALONE).await;
    let (ended, said) = race(&server, &[waiting("a", json!({})), waiting("b", json!({}))]).await;
    assert_eq!(ended, ["a", "b"]);
    assert_eq!(said[0]["order"], json!({ "policy": "fcfs" }));
    server.stop();
}

#[tokio::test]
async fn the_lowest_priority_number_goes_first() {
    let server = Server::start(&format!("{ALONE} --scheduling-policy priority")).await;
    let all = [
        waiting("low", json!({ "priority": 5 })),
        waiting("middle", json!({})),
        waiting("high", json!({ "priority": -1 })),
    ];
    let (ended, said) = race(&server, &all).await;
    assert_eq!(ended, ["high", "middle", "low"]);
    assert_eq!(said[0]["order"], json!({ "policy": "priority", "priority": 5 }));
    server.stop();
}

#[tokio::test]
async fn whose_token_is_due_first_goes_first() {
    let line = format!("{ALONE} --scheduling-policy deadline --slo-ttft-ms 500000 --slo-tpot-ms 40");
    let server = Server::start(&line).await;
    let all = [
        waiting("default", json!({})),
        Waiting {
            headers: &[("x-llm-d-slo-ttft-ms", "900000"), ("x-llm-d-slo-tpot-ms", "7.5")],
            ..waiting("patient", json!({}))
        },
        Waiting { headers: &[("x-slo-ttft-ms", "100000")], ..waiting("urgent", json!({})) },
    ];
    let (ended, said) = race(&server, &all).await;
    assert_eq!(ended, ["urgent", "default", "patient"]);
    let targets = |ttft: f64, tpot: f64| json!({ "policy": "deadline", "ttft_target_ms": ttft, "tpot_target_ms": tpot });
    assert_eq!(said[0]["order"], targets(500_000.0, 40.0));
    assert_eq!(said[1]["order"], targets(900_000.0, 7.5));
    assert_eq!(said[2]["order"], targets(100_000.0, 40.0));
    server.stop();
}

#[tokio::test]
async fn the_shortest_answer_goes_first_as_hinted() {
    let server = Server::start(&format!("{ALONE} --scheduling-policy shortest")).await;
    let all = [
        waiting("unknown", json!({ "max_tokens": 30 })),
        waiting("longer", json!({ "max_tokens": 60, "expected_output_tokens": 9 })),
        waiting("shorter", json!({ "max_tokens": 60, "expected_output_tokens": 2 })),
    ];
    let (ended, said) = race(&server, &all).await;
    assert_eq!(ended, ["shorter", "longer", "unknown"]);
    assert_eq!(said[0]["order"], json!({ "policy": "shortest", "expected_output_tokens": 30 }));
    assert_eq!(said[2]["order"], json!({ "policy": "shortest", "expected_output_tokens": 2 }));
    server.stop();
}

#[tokio::test]
async fn the_longest_prefix_in_the_cache_goes_first() {
    let server = Server::start(&format!("{ALONE} --scheduling-policy longest-prefix")).await;
    let known: Vec<u32> = (100..164).collect();
    server.ok(COMPLETIONS, completion(json!(known), 1)).await;
    let begins_with = |count: usize| {
        let mut prompt = known[..count].to_vec();
        prompt.extend(200..280 - u32::try_from(count).unwrap());
        json!({ "prompt": prompt })
    };
    let all = [
        waiting("nothing", begins_with(0)),
        waiting("some", begins_with(32)),
        waiting("most", begins_with(64)),
    ];
    let (ended, said) = race(&server, &all).await;
    assert_eq!(ended, ["most", "some", "nothing"]);
    assert_eq!(said[0]["order"], json!({ "policy": "longest-prefix" }));
    server.stop();
}

/// Two tenants by their keys, one with three times the other's share; others come with the open key.
fn tenants() -> String {
    let tenants = json!({
        "acme": { "weight": 3, "api_keys": ["sk-acme"] },
        "small": { "api_keys": ["sk-small"] },
    });
    format!("{ALONE} --scheduling-policy fair --api-key sk-open --tenants {tenants}")
}

const ACME: &[(&str, &str)] = &[("authorization", "Bearer sk-acme")];
const SMALL: &[(&str, &str)] = &[("authorization", "Bearer sk-small")];

#[tokio::test]
async fn tenants_are_known_by_their_keys_and_get_their_shares() {
    let server = Server::start(&tenants()).await;
    // Both ask for the same, one all at once before the other.
    let of = |headers, name| Waiting { headers, ..waiting(name, json!({ "user": "whoever" })) };
    let all = [
        of(SMALL, "small-1"),
        of(SMALL, "small-2"),
        of(SMALL, "small-3"),
        of(ACME, "acme-1"),
        of(ACME, "acme-2"),
        of(ACME, "acme-3"),
    ];
    let (ended, said) = race(&server, &all).await;
    // What the first one got counts once for its tenant, and a third for the other.
    assert_eq!(ended, ["small-1", "acme-1", "acme-2", "acme-3", "small-2", "small-3"]);
    assert_eq!(said[0]["order"], json!({ "policy": "fair", "tenant": "small", "served": 0.0 }));
    assert_eq!(said[5]["order"]["tenant"], "acme");
    server.stop();
}

#[tokio::test]
async fn whoever_has_no_key_of_its_own_is_who_its_header_or_body_says() {
    let server = Server::start(&format!("{ALONE} --scheduling-policy fair")).await;
    let header: &[_] = &[("x-llm-d-inference-fairness-id", "team-b")];
    let all = [
        waiting("nobody", json!({})),
        waiting("ann", json!({ "user": "ann" })),
        Waiting { headers: header, ..waiting("team", json!({ "user": "ann" })) },
    ];
    let (_, said) = race(&server, &all).await;
    let tenants: Vec<&Value> = said.iter().map(|said| &said["order"]["tenant"]).collect();
    assert_eq!(tenants, ["default-flow", "ann", "team-b"]);
    server.stop();
}

async fn refused(server: &Server, headers: &[(&'static str, &'static str)], body: Value) -> Answer {
    let request = request(&Waiting { name: "refused", headers: &[], body }, 2);
    let (mut parts, body) = request.into_parts();
    for &(name, value) in headers {
        parts.headers.append(name, value.parse().unwrap());
    }
    server.answer(Request::from_parts(parts, body)).await
}

#[tokio::test]
async fn nobody_takes_another_tenants_share() {
    let server = Server::start(&tenants()).await;
    const HEADER: &str = "x-llm-d-inference-fairness-id";
    for (key, name) in [("Bearer sk-acme", "small"), ("Bearer sk-open", "acme"), ("Bearer sk-small", "new")] {
        let answer = refused(&server, &[("authorization", key), (HEADER, name)], json!({})).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{}", answer.text);
        assert_eq!(
            (&answer.json()["error"]["param"], &answer.json()["error"]["code"]),
            (&json!(HEADER), &json!("tenant_mismatch"))
        );
    }
    let answer = refused(&server, &[("authorization", "Bearer sk-none")], json!({})).await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
    for (key, name) in [("Bearer sk-acme", "acme"), ("Bearer sk-open", "new")] {
        let answer = refused(&server, &[("authorization", key), (HEADER, name)], json!({})).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    }
    server.stop();
}

#[tokio::test]
async fn nonsense_for_an_order_is_400_and_names_the_field() {
    for policy in ["fcfs", "priority", "deadline", "shortest", "longest-prefix", "fair"] {
        let server = Server::start(&format!("--scheduling-policy {policy}")).await;
        for header in ["x-llm-d-slo-ttft-ms", "x-slo-tpot-ms"] {
            for nonsense in ["NaN", "0", "-1", "inf", "", "1e99"] {
                let answer = refused(&server, &[(header, nonsense)], json!({})).await;
                assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{header}: {nonsense}");
                assert_eq!(answer.json()["error"]["param"], *header);
            }
        }
        let answer = refused(&server, &[("x-gateway-inference-fairness-id", "a b")], json!({})).await;
        assert_eq!(answer.json()["error"]["param"], "x-gateway-inference-fairness-id");
        let hint = |tokens: Value| json!({ "expected_output_tokens": tokens });
        for body in [hint(json!(0)), hint(json!(-3)), hint(json!(1.5)), hint(json!("NaN"))] {
            let answer = refused(&server, &[], body).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{policy}");
            assert_eq!(answer.json()["error"]["param"], "expected_output_tokens");
        }
        let wishes = [("priority", json!(1), "priority"), ("shortest", json!(9), "expected_output_tokens")];
        for (needed, value, field) in wishes {
            let answer = refused(&server, &[], json!({ field: value })).await;
            let expected = if policy == needed { StatusCode::OK } else { StatusCode::BAD_REQUEST };
            assert_eq!(answer.status, expected, "{policy}: {field}: {}", answer.text);
            if policy != needed {
                assert!(answer.text.contains(&format!("--scheduling-policy {needed}")), "{}", answer.text);
            }
        }
        server.stop();
    }
}
