//! How the server ends: at the first signal it takes no more requests, and ends when those it has are answered; at the second it
//! ends at once.

use std::{process, sync::Arc};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use super::server::Server;
use crate::Failure;

/// Whether the server is ending, and how many requests it is answering.
pub struct Closing {
    is_closing: watch::Sender<bool>,
    answering: watch::Sender<usize>,
}

impl Default for Closing {
    fn default() -> Self {
        Self { is_closing: watch::Sender::new(false), answering: watch::Sender::new(0) }
    }
}

/// A request that is being answered, until this is dropped.
pub struct Answering(Arc<Server>);

impl Answering {
    /// `None` while the server is ending.
    pub fn begin(server: &Arc<Server>) -> Option<Self> {
        // Counted first: whoever waits for the last one after the end has begun sees it.
        let begun = Self::counted(server);
        if server.closing.has_begun() { None } else { Some(begun) }
    }

    fn counted(server: &Arc<Server>) -> Self {
        server.closing.answering.send_modify(|count| *count += 1);
        Self(Arc::clone(server))
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.closing.answering.send_modify(|count| *count -= 1);
    }
}

impl Closing {
    /// No more requests are taken from now on.
    pub fn begin(&self) {
        self.is_closing.send_replace(true);
    }

    pub fn has_begun(&self) -> bool {
        *self.is_closing.borrow()
    }

    /// Waits until it begins.
    pub async fn begins(&self) {
        // The sender is ours, and lives.
        let _ = self.is_closing.subscribe().wait_for(|is_closing| *is_closing).await;
    }

    /// Waits until it has begun and no request is being answered.
    pub async fn ends(&self) {
        self.begins().await;
        let _ = self.answering.subscribe().wait_for(|count| *count == 0).await;
    }
}

/// Begins the end at the first signal, SIGINT or SIGTERM, and ends the process at the second. The signals are noted from when this
/// returns.
///
/// # Errors
/// Where the system does not let us listen.
pub fn listen(server: Arc<Server>) -> Result<(), Failure> {
    let failed = |error| format!("cannot listen to signals: {error}");
    let mut interrupts = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminations = signal(SignalKind::terminate()).map_err(failed)?;
    tokio::spawn(async move {
        loop {
            let number = tokio::select! {
                _ = interrupts.recv() => libc::SIGINT,
                _ = terminations.recv() => libc::SIGTERM,
            };
            if server.closing.has_begun() {
                // As if the signal had ended it.
                process::exit(128 + number);
            }
            let running = *server.closing.answering.borrow();
            // Until this is said the process does not end; and once it is said, new ones are refused.
            let _saying = Answering::counted(&server);
            server.closing.begin();
            say!("ending: {running} requests are answered first, new ones are refused; a second signal ends at once");
        }
    });
    Ok(())
}
