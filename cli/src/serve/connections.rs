//! Connections: how many there are, what they may take, and how they end.

use std::{
    io,
    net::{TcpListener as Listener, ToSocketAddrs},
    os::fd::AsRawFd,
    pin::pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};

use super::{patience::Patient, server::Server};
use crate::Failure;

/// What a connection gathers before it sends, and takes of a request's head, in bytes.
const BUFFER: usize = 16 << 10;

/// What the system keeps of an answer that its client does not take, in bytes, before that is noticed. Left to itself it keeps megabytes.
static UNSENT: libc::c_int = 128 << 10;

/// Connections beside those whose requests run or wait: for what is refused, and for figures.
const MORE: usize = 256;

/// Files that the program has open for other things than connections.
const OTHER_FILES: u64 = 128;

/// How long connections may take to end when all requests are answered.
const ENDING: Duration = Duration::from_secs(2);

/// Takes the address, before the model is loaded: then it is known at once where that is not possible.
pub fn bind(host: &str, port: u16) -> Result<Listener, Failure> {
    let failed = |error: io::Error| {
        let remedy = match error.kind() {
            io::ErrorKind::AddrInUse => "another program has it; give another --port",
            io::ErrorKind::PermissionDenied => "give a --port from 1024 on",
            _ => "give this machine's name or one of its addresses as --host",
        };
        format!("cannot listen on {host}, port {port}: {error}; {remedy}")
    };
    let addresses = (host, port).to_socket_addrs().map_err(failed)?;
    let listener = Listener::bind(&addresses.collect::<Vec<_>>()[..]).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// How many connections there may be, where so many requests run and wait. As many files may be open from now on, if the system
/// allows that.
pub fn most(requests: usize) -> usize {
    let wanted = requests.saturating_add(MORE);
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes to `limit`, which lives.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return wanted;
    }
    let files = (wanted as u64).saturating_add(OTHER_FILES).clamp(limit.rlim_cur, limit.rlim_max.max(limit.rlim_cur));
    if files > limit.rlim_cur {
        let raised = libc::rlimit { rlim_cur: files, ..limit };
        // SAFETY: the call reads `raised`, which lives.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } == 0 {
            limit = raised;
        }
    }
    wanted.min(limit.rlim_cur.saturating_sub(OTHER_FILES).max(16) as usize)
}

/// Answers connections until the server has ended.
pub async fn serve(server: Arc<Server>, listener: TcpListener, router: Router, most: usize) {
    let most = most.min(Semaphore::MAX_PERMITS).min(u32::MAX as usize);
    let places = Arc::new(Semaphore::new(most));
    let mut ends = pin!(server.closing.ends());
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await.expect("nobody closes it");
            (listener.accept().await, place)
        };
        let (accepted, place) = tokio::select! {
            () = &mut ends => break,
            next = next => next,
        };
        match accepted {
            Ok((stream, _)) => {
                tokio::spawn(connection(Arc::clone(&server), stream, router.clone(), place));
            }
            // The client is gone already, or there are too many files: that may pass.
            Err(_) => sleep(Duration::from_millis(20)).await,
        }
    }
    drop(listener);
    // Last pieces are on their way.
    let _ = timeout(ENDING, places.acquire_many(most as u32)).await;
}

async fn connection(server: Arc<Server>, stream: TcpStream, router: Router, _place: OwnedSemaphorePermit) {
    let _counted = Counted::begin(&server);
    // Each piece of a stream is sent as it comes.
    let _ = stream.set_nodelay(true);
    limit_unsent(&stream);
    let patience = server.rules.patience;
    let is_closing = server.closing.has_begun();
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .max_buf_size(BUFFER)
        // One that comes now is told so, and no more.
        .keep_alive(!is_closing)
        .serve_connection(TokioIo::new(Patient::new(stream, patience)), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    // Whether it ended well or not, the client is gone.
    if is_closing {
        let _ = connection.await;
        return;
    }
    tokio::select! {
        _ = connection.as_mut() => return,
        () = server.closing.begins() => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

/// Without success the system keeps more, which does no harm.
fn limit_unsent(stream: &TcpStream) {
    let size = size_of_val(&UNSENT) as libc::socklen_t;
    // SAFETY: the call reads the number, which lives as long as the program, and the socket is open.
    unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, (&raw const UNSENT).cast(), size);
    }
}

/// A connection that is open.
struct Counted<'a>(&'a Server);

impl<'a> Counted<'a> {
    fn begin(server: &'a Server) -> Self {
        server.http.connections.fetch_add(1, Relaxed);
        Self(server)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.http.connections.fetch_sub(1, Relaxed);
    }
}
