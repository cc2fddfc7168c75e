//! What subscribers and who asks for a replay are sent, over loopback. The real clients are in `tests/clients`.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::support::{Server, completion, flags};
use crate::kv_events::KvEvents;

const CONFIG: &str = r#"--kv-events-config {"enable_kv_cache_events":true,"topic":"kv@here","endpoint":"tcp://*:0","replay_endpoint":"tcp://*:0"}"#;

/// ZeroMQ's greeting and handshake, as a socket of this kind begins them. What it says at first stands behind them.
async fn dial(stream: &mut TcpStream, kind: &str, first: &[u8]) {
    let mut greeting = [0; 64];
    (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
    greeting[12..16].copy_from_slice(b"NULL");
    let ready =
        format!("\x05READY\x0bSocket-Type\0\0\0{}{kind}", char::from(u8::try_from(kind.len()).unwrap()));
    stream.write_all(&greeting).await.unwrap();
    stream.write_all(&[4, u8::try_from(ready.len()).unwrap()]).await.unwrap();
    stream.write_all(ready.as_bytes()).await.unwrap();
    stream.write_all(first).await.unwrap();
    stream.read_exact(&mut greeting).await.unwrap();
    let (command, ready) = frame(stream).await;
    assert!(command == 4 && ready.starts_with(b"\x05READY"), "{ready:?}");
}

/// The flags and the body of the next frame.
async fn frame(stream: &mut TcpStream) -> (u8, Vec<u8>) {
    let flags = stream.read_u8().await.unwrap();
    let length = if flags & 2 == 0 {
        u64::from(stream.read_u8().await.unwrap())
    } else {
        stream.read_u64().await.unwrap()
    };
    let mut body = vec![0; usize::try_from(length).unwrap()];
    stream.read_exact(&mut body).await.unwrap();
    (flags & !2, body)
}

async fn message(stream: &mut TcpStream) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    loop {
        let (flags, body) = frame(stream).await;
        frames.push(body);
        if flags == 0 {
            return frames;
        }
    }
}

async fn connect(port: Option<u16>) -> TcpStream {
    TcpStream::connect(("127.0.0.1", port.unwrap())).await.unwrap()
}

async fn open(line: &str) -> KvEvents {
    flags(line).kv_events.open().await.unwrap().unwrap()
}

/// Until a metric of events has this value, of which nothing else tells.
async fn until(server: &Server, name: &str, value: u64) {
    let labels = format!("model_name=\"{}\",engine=\"0\"", server.app.names[0]);
    let line = format!("quayline:kv_events_{name}{{{labels}}} {value}");
    let shows = |metrics: &str| metrics.lines().any(|shown| shown.trim_end_matches(".0") == line);
    let wait = async {
        while !shows(&server.get("/metrics").await.text) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.unwrap_or_else(|_| panic!("no {line}"));
}

fn says(payload: &[u8], word: &str) -> bool {
    payload.windows(word.len()).any(|span| span == word.as_bytes())
}

#[tokio::test]
async fn blocks_are_told_numbered_and_told_again() {
    let KvEvents { outlet, ports: [port, replay_port], publisher } =
        open(&format!("{CONFIG} --data-parallel-rank 7")).await;
    let server = Server::start_telling(&format!("{CONFIG} --server-dev-mode 1"), Some(outlet)).await;
    let mut subscriber = connect(port).await;
    dial(&mut subscriber, "SUB", b"\0\x04\x01kv@").await;
    until(&server, "subscribers", 1).await;

    let prompt = json!((0..40).collect::<Vec<u32>>());
    server.ok("/v1/completions", completion(prompt, 1)).await;
    let stored = message(&mut subscriber).await;
    assert_eq!(stored[..2], [b"kv@here".to_vec(), 0_u64.to_be_bytes().to_vec()]);
    assert!(says(&stored[2], "BlockStored") && says(&stored[2], "GPU"));
    assert_eq!((stored[2][0], stored[2].last()), (0x93, Some(&7)), "an array that ends with the rank");

    assert_eq!(server.post("/reset_prefix_cache", &json!({})).await.status, 200);
    let cleared = message(&mut subscriber).await;
    assert_eq!(cleared[1], 1_u64.to_be_bytes());
    assert!(says(&cleared[2], "AllBlocksCleared") && !says(&cleared[2], "BlockStored"));

    let mut replay = connect(replay_port).await;
    dial(&mut replay, "DEALER", b"\x01\0\0\x08\0\0\0\0\0\0\0\0").await;
    for told in [stored, cleared.clone()] {
        assert_eq!(message(&mut replay).await, [vec![vec![]], told].concat());
    }
    let end = [vec![], vec![], vec![0xff; 8], vec![]];
    assert_eq!(message(&mut replay).await, end);
    replay.write_all(b"\x01\0\0\x08\0\0\0\0\0\0\0\x01").await.unwrap();
    assert_eq!(message(&mut replay).await[1..], cleared);
    assert_eq!(message(&mut replay).await, end);

    for (name, count) in [("batches_total", 2), ("events_total", 2), ("replayed_batches_total", 3)] {
        until(&server, name, count).await;
    }
    server.stop();
    publisher.await.unwrap();
    assert_eq!(subscriber.read(&mut [0; 1]).await.unwrap(), 0, "closed when all was told");
}

#[tokio::test]
async fn a_subscriber_is_called_on_until_it_is_there() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let config = format!(
        r#"--kv-events-config {{"enable_kv_cache_events":true,"endpoint":"tcp://127.0.0.1:{port}"}}"#
    );
    let KvEvents { outlet, ports, publisher } = open(&config).await;
    assert_eq!(ports, [None, None]);
    let server = Server::start_telling(&config, Some(outlet)).await;
    // The first call is not answered as it should be.
    drop(listener.accept().await.unwrap());
    let (mut subscriber, _) = listener.accept().await.unwrap();
    dial(&mut subscriber, "SUB", b"\0\x01\x01").await;
    until(&server, "subscribers", 1).await;
    server.ok("/v1/completions", completion(json!((0..40).collect::<Vec<u32>>()), 1)).await;
    assert!(says(&message(&mut subscriber).await[2], "BlockStored"));
    server.stop();
    publisher.await.unwrap();
}

#[tokio::test]
async fn nothing_is_told_unless_somebody_asks_for_it() {
    for line in [
        "",
        "--kv-events-config {}",
        r#"--kv-events-config {"enable_kv_cache_events":false,"publisher":"zmq"}"#,
        r#"--kv-events-config {"enable_kv_cache_events":true,"publisher":"null"}"#,
    ] {
        assert!(flags(line).kv_events.open().await.unwrap().is_none(), "{line}");
        assert!(!flags(line).options().kv_events, "{line}");
    }
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = taken.local_addr().unwrap().port();
    for config in [
        format!(r#""endpoint":"tcp://*:{port}""#),
        format!(r#""endpoint":"tcp://*:0","replay_endpoint":"tcp://*:{port}""#),
    ] {
        let line = format!(r#"--kv-events-config {{"enable_kv_cache_events":true,{config}}}"#);
        let error = flags(&line).kv_events.open().await.unwrap_err();
        assert!(error.starts_with(&format!("cannot publish events on tcp://*:{port}: ")), "{error}");
    }
}
