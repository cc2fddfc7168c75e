//! The client against a server of a few lines that says exactly what each test needs.
#![expect(clippy::unwrap_used, reason = "a test whose setup fails has failed")]

use std::time::Duration;

use quayline_benches::client::{Client, Failure, Outcome, Target};
use quayline_benches::workload::{Endpoint, Expected, Fate, Work};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const CHUNK: &str = "data: {\"choices\":[{\"text\":\"a\",\"finish_reason\":null}]}\n\n";
const LAST: &str = "data: {\"choices\":[{\"text\":\"b\",\"finish_reason\":\"length\"}]}\n\n\
    data: {\"choices\":[],\"usage\":{\"prompt_tokens\":4,\"completion_tokens\":7}}\n\ndata: [DONE]\n\n";

fn work(fate: Fate) -> Work {
    Work {
        endpoint: Endpoint::Completions,
        body: "{}".to_owned(),
        stream: true,
        fate,
        expected: Expected::Answer,
    }
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// Answers each request of each connection with `answer` and holds the connection open until the client closes it.
/// Gives back how many connections were made and how many requests came.
fn with_server(answer: String, test: impl AsyncFnOnce(Client)) -> (usize, usize) {
    with_closing_server(answer, usize::MAX, test)
}

/// The same; after `answers_each` answers it closes a connection when the next request comes.
fn with_closing_server(
    answer: String,
    answers_each: usize,
    test: impl AsyncFnOnce(Client),
) -> (usize, usize) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let counts = std::rc::Rc::new(std::cell::Cell::new((0, 0)));
        let counted = std::rc::Rc::clone(&counts);
        let server = tokio::task::spawn_local(async move {
            'connections: loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                counted.set((counted.get().0 + 1, counted.get().1));
                let mut answered = 0;
                let mut seen = Vec::new();
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                    seen.extend_from_slice(&buffer[..count]);
                    while let Some(end) = seen.windows(6).position(|bytes| bytes == b"\r\n\r\n{}") {
                        seen.drain(..end + 6);
                        counted.set((counted.get().0, counted.get().1 + 1));
                        if answered == answers_each {
                            continue 'connections;
                        }
                        answered += 1;
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                }
            }
        });
        test(Client::new(Target::parse(&url, None, false).unwrap())).await;
        server.abort();
        counts.get()
    })
}

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn a_connection_serves_many_requests() {
    let counts = with_server(ok(&format!("{CHUNK}{CHUNK}{LAST}")), async |mut client| {
        for _ in 0..3 {
            let mut gaps = Vec::new();
            let outcome = client.send(work(Fate::Finish), LIMIT, &mut gaps).await.unwrap();
            let Outcome::Answered(answer) = outcome else { panic!("{outcome:?}") };
            assert_eq!((answer.pieces, answer.usage.completion_tokens, gaps.len()), (3, 7, 2));
        }
    });
    assert_eq!(counts, (1, 3));
}

#[test]
fn a_kept_connection_that_closes_is_made_anew() {
    let counts = with_closing_server(ok(LAST), 1, async |mut client| {
        for _ in 0..3 {
            let outcome = client.send(work(Fate::Finish), LIMIT, &mut Vec::new()).await;
            assert!(matches!(outcome, Ok(Outcome::Answered(_))), "{outcome:?}");
        }
    });
    assert_eq!(counts, (3, 5));
    let counts = with_closing_server(ok(LAST), 0, async |mut client| {
        let outcome = client.send(work(Fate::Finish), LIMIT, &mut Vec::new()).await;
        assert_eq!(outcome.err(), Some(Failure::Connection));
    });
    assert_eq!(counts, (1, 1));
}

#[test]
fn leaving_closes_the_connection() {
    let counts = with_server(
        format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{CHUNK}\r\n", CHUNK.len()),
        async |mut client| {
            for _ in 0..2 {
                let outcome = client.send(work(Fate::LeaveAfterPieces(1)), LIMIT, &mut Vec::new()).await;
                assert!(matches!(outcome, Ok(Outcome::Left)), "{outcome:?}");
            }
            let outcome =
                client.send(work(Fate::LeaveAfter(Duration::from_millis(20))), LIMIT, &mut Vec::new()).await;
            assert!(matches!(outcome, Ok(Outcome::Left)), "{outcome:?}");
        },
    );
    assert_eq!(counts, (3, 3));
}

#[test]
fn failures_have_kinds() {
    let cases = [
        ("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n".to_owned(), Failure::Status(503)),
        (ok(CHUNK), Failure::EndedEarly),
        ("not http\r\n\r\n".to_owned(), Failure::Connection),
        (ok("data: {\"error\":{\"message\":\"x\"}}\n\n"), Failure::ErrorEvent),
    ];
    for (answer, expected) in cases {
        with_server(answer, async |mut client| {
            let outcome = client.send(work(Fate::Finish), LIMIT, &mut Vec::new()).await;
            assert_eq!(outcome.err(), Some(expected));
        });
    }
    with_server("HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n".to_owned(), async |mut client| {
        let outcome = client.send(work(Fate::Finish), Duration::from_millis(30), &mut Vec::new()).await;
        assert_eq!(outcome.err(), Some(Failure::Timeout));
    });
}

#[test]
fn a_wrong_request_must_be_refused() {
    let wrong = || Work { expected: Expected::Refusal, ..work(Fate::Finish) };
    with_server("HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}".to_owned(), async |mut client| {
        let outcome = client.send(wrong(), LIMIT, &mut Vec::new()).await;
        assert!(matches!(outcome, Ok(Outcome::Refused)), "{outcome:?}");
    });
    with_server(ok(LAST), async |mut client| {
        let outcome = client.send(wrong(), LIMIT, &mut Vec::new()).await;
        assert_eq!(outcome.err(), Some(Failure::NotRefused));
    });
}
