#![doc = include_str!("../README.md")]

mod access;
mod api;
mod app;
mod auth;
mod caller;
mod complaint;
mod config;
mod connection;
mod debug;
mod engine;
mod foreign;
mod kv_events;
mod metrics;
mod model;
mod offloading;
mod order;
mod page;
mod probe;
mod process;
mod residency;
mod shutdown;
mod speculative;
mod tenants;
#[cfg(test)]
mod tests;
mod transfer;

use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

use crate::app::{App, Started};
use crate::config::{Flags, explain};
use crate::connection::Listener;
use crate::kv_events::KvEvents;
use crate::shutdown::{Drained, Signals};

/// Threads for sockets and HTTP. Most of the machine belongs to the arithmetic.
const WORKERS: usize = 2;

/// Threads for templates and tokenizers.
const TEXT_WORKERS: usize = 2;

/// After the last request has finished, connections get this long to take what was written.
const LAST_BYTES: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let begun = Instant::now();
    let flags = match Flags::parse_from_command_line(std::env::args_os()) {
        Ok(flags) => flags,
        Err(error) => error.exit(),
    };
    log_to_stderr();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(TEXT_WORKERS)
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) => {
            let ended = runtime.block_on(run(flags, begun));
            // A step or a template that is still running has nobody left to answer.
            runtime.shutdown_background();
            ended
        }
        Err(error) => Err(format!("cannot start threads: {error}")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            say(&mut std::io::stderr(), &format!("error: {message}\n"));
            ExitCode::FAILURE
        }
    }
}

/// Serves until a signal ends it.
///
/// # Errors
/// Why it could not start, in one line.
async fn run(flags: Flags, begun: Instant) -> Result<(), String> {
    let mut signals = Signals::new().map_err(|error| format!("cannot handle signals: {error}"))?;
    let files_max = process::raise_files_max();
    let network = &flags.network;
    let listener = Listener::bind(&network.host, network.port, network.uds.as_deref())
        .await
        .map_err(|error| network.refused(&error))?;
    let events = flags.kv_events.open().await?;
    if let Some(KvEvents { ports: [port, replay_port], .. }) = events {
        tracing::info!(port, replay_port, "publishing events of the cache");
    }
    let (outlet, publisher) = events.map(|events| (events.outlet, events.publisher)).unzip();
    let Started { app, engine, loaded } =
        app::start(flags.clone(), outlet).map_err(|error| explain(&error))?;
    let (router, _) =
        app::routes(&app, &flags.network.root_path, flags.dev_mode, &flags.network.allowed_origins);
    let url = listener.url();
    let (close, closing) = watch::channel(false);
    let serving = tokio::spawn(connection::serve(listener, router, files_max, closing));

    let model = tokio::select! {
        loaded = loaded => loaded.map_err(|_| "the engine failed while loading".to_owned())?,
        () = signals.next() => return Ok(()),
    };
    app.begin(model.map_err(|error| explain(&error))?);
    tracing::info!(milliseconds = begun.elapsed().as_secs_f64() * 1e3, url, model = app.names[0], "ready");
    say(&mut std::io::stdout(), &greeting(&app, &url, &flags));

    signals.next().await;
    let limit = Duration::from_secs(flags.network.shutdown_timeout);
    let mut by = Instant::now() + limit;
    let drained = shutdown::drain(&app, limit, signals.next()).await;
    if let Drained::Cut(unfinished) = drained {
        tracing::warn!(unfinished, "stopping before all requests finished");
        by = Instant::now();
    }
    app.engine.stop(by);
    close.send_replace(true);
    tokio::select! {
        () = app.engine.ended() => {}
        () = tokio::time::sleep_until(by.into()) => {}
        () = signals.next() => app.engine.stop(Instant::now()),
    }
    let _ = tokio::time::timeout(LAST_BYTES, finish(serving, engine, publisher, close)).await;
    tracing::info!("stopped");
    Ok(())
}

/// Until the engine's thread and the door are closed and the connections, and subscribers to events, have been sent
/// their last bytes.
async fn finish(
    serving: tokio::task::JoinHandle<()>,
    engine: std::thread::JoinHandle<()>,
    publisher: Option<tokio::task::JoinHandle<()>>,
    close: watch::Sender<bool>,
) {
    let _ = serving.await;
    let _ = tokio::task::spawn_blocking(move || engine.join()).await;
    if let Some(publisher) = publisher {
        let _ = publisher.await;
    }
    close.closed().await;
}

/// What a person who typed the command wants to see.
fn greeting(app: &App, url: &str, flags: &Flags) -> String {
    let socket =
        flags.network.uds.as_ref().map_or(String::new(), |path| format!(" --unix-socket {}", path.display()));
    let key = if flags.keys().is_empty() { "" } else { " -H 'Authorization: Bearer YOUR_KEY'" };
    let body = r#"{"messages": [{"role": "user", "content": "Who art thou?"}], "max_tokens": 60}"#;
    format!(
        "{} is served at {url}\n\n  curl{socket} {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n    -d '{body}'\n\n",
        app.names[0]
    )
}

/// JSON lines, without prompts; `RUST_LOG` sets how many.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().json().with_writer(std::io::stderr).with_env_filter(filter).init();
}

/// Prints, and carries on when nobody listens.
fn say(to: &mut impl Write, text: &str) {
    let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
}
