//! Sockets: accepting them within limits, and not letting slow or silent peers cost others anything.

use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};

use crate::process;

/// A connection may be silent so long before its first request.
const SILENT_MAX: Duration = Duration::from_secs(600);

/// A request's head must arrive within this time; between two requests this is the time to wait.
const HEAD_MAX: Duration = Duration::from_secs(60);

/// A peer that takes no byte of what we write for so long is gone.
const STALL_MAX: Duration = Duration::from_secs(30);

/// Largest request head, and most bytes of one connection between us and the socket.
const BUFFER_BYTES_MAX: usize = 64 << 10;

/// The memory that closed connections leave is given back to the system at most this often.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(10);

/// Files that are not connections: the model, the log, the poller.
const FILES_RESERVED: u64 = 64;

/// Where clients come in.
#[derive(Debug)]
pub(crate) enum Listener {
    /// At an address.
    Tcp(TcpListener),
    /// At a path.
    Unix(UnixListener),
}

impl Listener {
    /// Opens the door.
    ///
    /// # Errors
    /// What the system says.
    pub(crate) async fn bind(host: &str, port: u16, path: Option<&Path>) -> io::Result<Self> {
        match path {
            None => TcpListener::bind((host, port)).await.map(Self::Tcp),
            Some(path) => {
                remove_stale(path)?;
                UnixListener::bind(path).map(Self::Unix)
            }
        }
    }

    /// The address as one would type it.
    pub(crate) fn url(&self) -> String {
        match self {
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) if address.ip().is_unspecified() => {
                    format!("http://127.0.0.1:{}", address.port())
                }
                Ok(address) => format!("http://{address}"),
                Err(_) => "http://localhost".into(),
            },
            Self::Unix(_) => "http://localhost".into(),
        }
    }

    async fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Tokens leave one by one; nothing is gained by waiting for more.
                stream.set_nodelay(true)?;
                Ok(Socket::Tcp(stream))
            }
            Self::Unix(listener) => Ok(Socket::Unix(listener.accept().await?.0)),
        }
    }
}

/// A socket file that nobody listens on is left over from a server that was killed.
fn remove_stale(path: &Path) -> io::Result<()> {
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        _ => Ok(()),
    }
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Until the peer sends something. False when it closes instead.
    async fn speaks(&self) -> bool {
        match self {
            // To look is to know: a new socket counts as readable until it has been tried.
            Self::Tcp(stream) => matches!(stream.peek(&mut [0]).await, Ok(1..)),
            Self::Unix(stream) => stream.readable().await.is_ok(),
        }
    }
}

/// Serves connections until `closing` turns true, then lets those that are busy finish.
pub(crate) async fn serve(
    listener: Listener,
    router: Router,
    files_max: u64,
    mut closing: watch::Receiver<bool>,
) {
    let most = usize::try_from(files_max.saturating_sub(FILES_RESERVED)).unwrap_or(usize::MAX);
    let room = Arc::new(Semaphore::new(most.clamp(1, Semaphore::MAX_PERMITS)));
    let closed = Arc::new(AtomicBool::new(false));
    let _keeper = JoinSet::from_iter([give_back_memory(Arc::clone(&closed))]);
    loop {
        let permit = Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
        let accepted = tokio::select! {
            _ = closing.wait_for(|closing| *closing) => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(socket) => {
                let closed = Arc::clone(&closed);
                tokio::spawn(connection(socket, router.clone(), closing.clone(), (permit, closed)));
            }
            // Out of files, or a peer that left at once: neither is cured by asking again immediately.
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Ten thousand connections leave a hundred megabytes in pieces that the allocator keeps.
async fn give_back_memory(closed: Arc<AtomicBool>) {
    loop {
        sleep(GIVE_BACK_EVERY).await;
        if closed.swap(false, Ordering::Relaxed) {
            // Nobody waits for it.
            drop(tokio::task::spawn_blocking(process::give_back_memory));
        }
    }
}

/// One connection. Until its first byte it costs a few hundred bytes: no buffer, no parser.
async fn connection(
    socket: Socket,
    router: Router,
    mut closing: watch::Receiver<bool>,
    (_permit, closed): (OwnedSemaphorePermit, Arc<AtomicBool>),
) {
    let speaks = tokio::select! {
        _ = closing.wait_for(|closing| *closing) => false,
        speaks = timeout(SILENT_MAX, socket.speaks()) => speaks.unwrap_or(false),
    };
    if !speaks {
        return;
    }
    // The state of a busy connection is large; it lives on the heap only while there is one.
    match socket {
        Socket::Tcp(stream) => Box::pin(exchange(stream, router, closing)).await,
        Socket::Unix(stream) => Box::pin(exchange(stream, router, closing)).await,
    }
    closed.store(true, Ordering::Relaxed);
}

async fn exchange<S>(stream: S, router: Router, mut closing: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let io = TokioIo::new(Stalling::new(stream, STALL_MAX));
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_MAX)
            .max_buf_size(BUFFER_BYTES_MAX)
            .serve_connection(io, TowerToHyperService::new(router))
    );
    // Errors here are the peer's: it left, or spoke no HTTP. Requests it left behind are in the access log.
    let done = tokio::select! {
        _ = connection.as_mut() => true,
        _ = closing.wait_for(|closing| *closing) => false,
    };
    if !done {
        connection.as_mut().graceful_shutdown();
        let _ = connection.await;
    }
}

/// A stream that fails when the peer takes nothing for too long.
#[derive(Debug)]
struct Stalling<S> {
    stream: S,
    stall_max: Duration,
    /// Runs while a write is stuck. Made once, at the first time that one is.
    deadline: Option<Pin<Box<Sleep>>>,
    stuck: bool,
}

impl<S> Stalling<S> {
    fn new(stream: S, stall_max: Duration) -> Self {
        Self { stream, stall_max, deadline: None, stuck: false }
    }

    fn watch<T>(&mut self, context: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.stuck = false;
            return polled;
        }
        let at = Instant::now() + self.stall_max;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep_until(at)));
        if !std::mem::replace(&mut self.stuck, true) {
            deadline.as_mut().reset(at);
        }
        ready!(deadline.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Stalling<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Stalling<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        self.watch(context, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn a_silent_connection_is_small() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let socket = Socket::Tcp(listener.accept().await.unwrap().0);
        let at_once = timeout(Duration::ZERO, socket.speaks()).await;
        assert!(at_once.is_err(), "nothing was said, so nothing is set up: {at_once:?}");
        let room = Arc::new(Semaphore::new(1));
        let (_close, closing) = watch::channel(false);
        let permit = Arc::clone(&room).acquire_owned().await.unwrap();
        let future = connection(socket, Router::new(), closing, (permit, Arc::default()));
        assert!(size_of_val(&future) < 1024, "{} bytes", size_of_val(&future));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_given_up() {
        let (near, _far) = duplex(8);
        let mut stream = Stalling::new(near, STALL_MAX);
        let begun = Instant::now();
        let error = stream.write_all(&[0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= STALL_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_a_little_now_and_then_is_not() {
        let (near, mut far) = duplex(8);
        let reader = tokio::spawn(async move {
            let mut buffer = [0; 8];
            let mut taken = 0;
            while taken < 64 {
                sleep(STALL_MAX / 2).await;
                taken += far.read(&mut buffer).await.unwrap();
            }
        });
        Stalling::new(near, STALL_MAX).write_all(&[0; 64]).await.unwrap();
        reader.await.unwrap();
    }
}
