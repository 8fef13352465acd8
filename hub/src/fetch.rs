//! Questions to the hub over HTTP.
//!
//! Redirects are followed here, not by the HTTP library: the hub's own headers come with the first answer, before a redirect to
//! another host, and the token goes to no host but the hub's.

use std::{
    cell::Cell,
    env,
    io::{self, Write},
    sync::Once,
    thread,
    time::Duration,
};

use indicatif::ProgressBar;
use rustls::CertificateError;
use serde_json::Value;
use ureq::{
    Agent, Body, BodyReader,
    http::{HeaderMap, Method, Request, Response, StatusCode, Uri},
    tls::{Certificate, RootCerts, TlsConfig},
};

use crate::{
    cache::{is_plain, token},
    error::{Error, Result},
};

/// Tries of one question, unless bytes have come meanwhile.
const TRIES: u32 = 5;
/// The longest pause between two tries, whatever the hub asks for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);
/// Redirects of one question.
const HOPS: usize = 10;
/// Bytes of a listing: one of ten thousand files has a million.
const LONGEST_LISTING: u64 = 64 << 20;

/// Why there is no answer.
pub enum Fault {
    /// It may be another answer the next time, after the pause that the hub asks for.
    Passing(String, Option<Duration>),
    /// What comes is not the file that was announced.
    WrongLength(String),
    Final(Error),
}

/// The files of a commit.
pub struct Listing {
    pub commit: String,
    pub files: Vec<String>,
}

impl Listing {
    pub fn has(&self, file: &str) -> bool {
        self.files.iter().any(|listed| listed == file)
    }
}

/// What the hub says of a file before it sends it.
pub struct Meta {
    /// Names its content: the SHA-256 for large files.
    pub etag: String,
    /// In bytes.
    pub length: u64,
}

/// The hub, asked for one model.
pub struct Hub {
    agent: Agent,
    endpoint: String,
    /// Whose token it is.
    origin: Uri,
    repository: String,
    token: Option<(String, String)>,
    /// Nothing is shown.
    pub quiet: bool,
    /// What is on the terminal while something is said.
    pub bar: ProgressBar,
    /// Whether there was any answer: there is a network, and what fails now may pass.
    answered: Cell<bool>,
}

impl Hub {
    pub fn new(repository: &str, quiet: bool) -> Result<Self> {
        let said = env::var("HF_ENDPOINT").ok().filter(|endpoint| !endpoint.is_empty());
        let endpoint = said.as_deref().unwrap_or("https://huggingface.co").trim_end_matches('/').to_owned();
        let origin = endpoint.parse::<Uri>().ok().filter(|uri| ["http", "https"].map(Some).contains(&uri.scheme_str()));
        let Some(origin) = origin.filter(|uri| uri.host().is_some()) else {
            let remedy = "give one such as https://huggingface.co";
            return Err(Error::Variable(format!("HF_ENDPOINT is {endpoint}, which is no address; {remedy}")));
        };
        let silence = env::var("HF_HUB_DOWNLOAD_TIMEOUT").ok().filter(|seconds| !seconds.is_empty());
        let silence = silence.map_or(Ok(Duration::from_secs(10)), |seconds| {
            let parsed = seconds.parse().ok().filter(|seconds: &f64| (0.1..1e6).contains(seconds));
            parsed
                .map(Duration::from_secs_f64)
                .ok_or(Error::Variable(format!("HF_HUB_DOWNLOAD_TIMEOUT is {seconds}; give seconds, such as 10")))
        })?;
        let config = Agent::config_builder()
            .tls_config(TlsConfig::builder().root_certs(certificates(origin.scheme_str() == Some("https"))?).build())
            .user_agent(concat!("layer-streamer/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_per_read(Some(silence))
            .timeout_per_write(Some(silence))
            .timeout_recv_response(Some(3 * silence))
            .build();
        let mut hub = Self {
            agent: config.new_agent(),
            endpoint,
            origin,
            repository: repository.to_owned(),
            token: token()?,
            quiet,
            bar: ProgressBar::hidden(),
            answered: Cell::new(false),
        };
        if !quiet {
            hub.bar = ProgressBar::new_spinner().with_message("asking the hub for the model's files …");
            hub.bar.enable_steady_tick(Duration::from_millis(100));
        }
        Ok(hub)
    }

    /// Says something on stderr, which may be closed or full: that is no reason to stop.
    pub fn say(&self, line: &str) {
        if !self.quiet {
            // In one piece, since stderr passes on each part as it comes.
            let _ = self.bar.suspend(|| io::stderr().write_all(format!("{line}\n").as_bytes()));
        }
    }

    /// The files of a revision.
    ///
    /// # Errors
    /// Where there is no such model or revision, the hub does not answer, or what it lists lies outside a folder.
    pub fn listing(&self, revision: &str) -> Result<Listing> {
        let at = format!("{}/api/models/{}/revision/{revision}", self.endpoint, self.repository);
        let json = self.patiently(|| {
            let mut answer = self.ask(&Method::GET, &at, 0, |_| false)?;
            let body = answer.body_mut().with_config().limit(LONGEST_LISTING).read_to_vec();
            body.map_err(|error| self.unreachable(&at, &error))
        })?;
        let malformed = |cause: &str| Error::Answer(format!("{at}: the hub's answer makes no sense: {cause}"));
        let listing: Value = serde_json::from_slice(&json).map_err(|error| malformed(&error.to_string()))?;
        let commit = listing["sha"].as_str().filter(|commit| is_plain(commit)).ok_or_else(|| malformed("no commit"))?;
        let mut files = Vec::new();
        for sibling in listing["siblings"].as_array().ok_or_else(|| malformed("no list of files"))? {
            let file = sibling["rfilename"].as_str().ok_or_else(|| malformed("a file without a name"))?;
            if file.split('/').any(|part| ["", ".", ".."].contains(&part)) || file.contains(['\\', '\0']) {
                return Err(malformed(&format!(
                    "the file {file:?} would lie outside the model's folder; nothing is taken"
                )));
            }
            files.push(file.to_owned());
        }
        Ok(Listing { commit: commit.to_owned(), files })
    }

    /// What a file is, without its bytes.
    pub fn meta(&self, commit: &str, file: &str) -> Result<Meta> {
        let at = self.address(commit, file);
        let (etag, length, from) = self.patiently(|| {
            let (mut etag, mut length, mut from) = (None, None, None);
            // The hub says it of large files beside the redirect to where they lie.
            let answer = self.ask(&Method::HEAD, &at, 0, |headers| {
                etag = etag.take().or_else(|| text(headers, "x-linked-etag"));
                length = length.take().or_else(|| text(headers, "x-linked-size"));
                from = from.take().or_else(|| text(headers, "x-repo-commit"));
                etag.is_some() && length.is_some()
            })?;
            let or = |known: Option<String>, name| known.or_else(|| text(answer.headers(), name));
            Ok((or(etag, "etag"), or(length, "content-length"), from))
        })?;
        let malformed = |cause: &str| Error::Answer(format!("{at}: the hub's answer makes no sense: {cause}"));
        let etag = etag.unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
        if !is_plain(&etag) {
            return Err(malformed("it has no ETag, which names the content"));
        }
        if let Some(from) = from.filter(|from| from != commit) {
            return Err(malformed(&format!("the file is of commit {from}")));
        }
        let length = length
            .and_then(|length| length.parse().ok())
            .ok_or_else(|| malformed("it does not say how long the file is"))?;
        Ok(Meta { etag, length })
    }

    /// The file's bytes, and where they begin: at `start`, or at 0 where a server knows no ranges.
    pub fn open(&self, commit: &str, file: &str, meta: &Meta, start: u64) -> Result<(u64, BodyReader<'static>), Fault> {
        let at = self.address(commit, file);
        let answer = self.ask(&Method::GET, &at, start, |_| false)?;
        let (length, number) = (meta.length, |text: &str| text.parse::<u64>().ok());
        // "bytes FIRST-LAST/ALL"
        let range = text(answer.headers(), "content-range").unwrap_or_default();
        let (begins, all) = match answer.status() {
            StatusCode::PARTIAL_CONTENT => {
                let parts = range.strip_prefix("bytes ").and_then(|range| range.split_once('/'));
                let first = parts.and_then(|(range, _)| number(range.split('-').next()?));
                (first, parts.and_then(|(_, all)| number(all)))
            }
            // There is nothing from there on.
            StatusCode::RANGE_NOT_SATISFIABLE => {
                (Some(start), Some(range.strip_prefix("bytes */").and_then(number).unwrap_or(start)))
            }
            _ => (Some(0), text(answer.headers(), "content-length").as_deref().and_then(number)),
        };
        if let Some(all) = all.filter(|all| *all != length) {
            return Err(Fault::WrongLength(format!("{at} has {all} bytes, not the {length} that the hub announced")));
        }
        match begins {
            Some(begins) if begins == 0 || begins == start => Ok((begins, answer.into_body().into_reader())),
            _ => {
                let error = format!("{at}: bytes from {start} on were asked for, but \"{range}\" came; check proxies");
                Err(Fault::Final(Error::Answer(error)))
            }
        }
    }

    fn address(&self, commit: &str, file: &str) -> String {
        format!("{}/{}/resolve/{commit}/{file}", self.endpoint, self.repository)
    }

    /// Asks, and goes where the answer points to. `enough` sees the headers of each answer, and may be content with them.
    fn ask(
        &self,
        method: &Method,
        at: &str,
        start: u64,
        mut enough: impl FnMut(&HeaderMap) -> bool,
    ) -> Result<Response<Body>, Fault> {
        let final_ = |cause: String| Fault::Final(Error::Answer(cause));
        let mut to: Uri = at.parse().map_err(|error| final_(format!("{at} is no address: {error}")))?;
        for _ in 0..=HOPS {
            let is_hub = same_origin(&to, &self.origin);
            // Lengths are those of the file, not of what a server makes of it.
            let mut request = Request::builder().method(method).uri(&to).header("accept-encoding", "identity");
            if start > 0 {
                request = request.header("range", format!("bytes={start}-"));
            }
            if let Some((token, _)) = self.token.as_ref().filter(|_| is_hub) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let request = request.body(()).map_err(|_| Fault::Final(self.bad_token()))?;
            let answer = self.agent.run(request).map_err(|error| self.unreachable(at, &error))?;
            self.answered.set(true);
            let status = answer.status();
            if !status.is_redirection() {
                return if status.is_success() || (start > 0 && status == StatusCode::RANGE_NOT_SATISFIABLE) {
                    Ok(answer)
                } else {
                    Err(self.refused(&answer, at, &to, is_hub))
                };
            }
            if enough(answer.headers()) {
                return Ok(answer);
            }
            let next = text(answer.headers(), "location").and_then(|location| resolved(&to, &location));
            let next = next.ok_or_else(|| final_(format!("{at}: {status} points to no address")))?;
            if to.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(final_(format!(
                    "{at}: the answer points from https to {}, which is not followed",
                    place(&next)
                )));
            }
            to = next;
        }
        Err(final_(format!(
            "{at}: more than {HOPS} redirects, the last to {}; check HF_ENDPOINT and proxies",
            place(&to)
        )))
    }

    /// What a status that is no success means.
    fn refused(&self, answer: &Response<Body>, at: &str, to: &Uri, is_hub: bool) -> Fault {
        let (status, repository, endpoint) = (answer.status(), &self.repository, &self.endpoint);
        let code = text(answer.headers(), "x-error-code").unwrap_or_default();
        let page = format!("{endpoint}/{repository}");
        let error = match status.as_u16() {
            // The address that the hub gave holds for a while only.
            403 if !is_hub => {
                return Fault::Passing(format!("{} answers {status}", to.host().unwrap_or_default()), None);
            }
            401 | 403 if is_hub => {
                let token = match &self.token {
                    None => "set HF_TOKEN to a token of yours".to_owned(),
                    Some((_, from)) => format!("check the token of {from}, and what it may read"),
                };
                match code.as_str() {
                    "GatedRepo" => {
                        format!("{repository} is gated ({status}): accept its licence at {page}, and {token}")
                    }
                    _ => format!(
                        "the hub shows no model {repository} ({status}): it does not exist, or is private or gated; check the \
                         name, {token}, and accept its licence at {page} if it has one"
                    ),
                }
            }
            404 if code == "RevisionNotFound" => {
                format!("{repository} has no such revision ({at} answers {status}); {page} lists them")
            }
            404 if !at.starts_with(&format!("{endpoint}/api/")) => {
                format!("{at} answers {status}, though the model has it; try again later")
            }
            404 => format!(
                "there is no such model or revision: {at} answers {status}; check the name, for it is no folder either"
            ),
            429 | 500..=599 => {
                let pause = text(answer.headers(), "retry-after").and_then(|seconds| seconds.parse().ok());
                return Fault::Passing(format!("{at} answers {status}"), pause.map(Duration::from_secs));
            }
            _ => format!("{at} answers {status}; check HF_ENDPOINT and proxies"),
        };
        Fault::Final(Error::Refused(error))
    }

    fn bad_token(&self) -> Error {
        let from = self.token.as_ref().map_or("HF_TOKEN", |(_, from)| from);
        let remedy = "take a new one from the settings of your account";
        Error::Variable(format!("the token of {from} has characters that no token has; {remedy}"))
    }

    /// No answer, or none that is complete.
    pub fn unreachable(&self, at: &str, error: &ureq::Error) -> Fault {
        if let Some(cause) = invalid_certificate(error) {
            let remedy = match cause {
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                    "check HF_ENDPOINT and proxies"
                }
                _ => CERTIFICATES,
            };
            return Fault::Final(Error::Certificate(format!("{at}: invalid peer certificate: {cause}; {remedy}")));
        }
        match error {
            ureq::Error::BodyExceedsLimit(most) => {
                Fault::Final(Error::Answer(format!("{at}: the answer is longer than {most} bytes")))
            }
            ureq::Error::Io(io) => Fault::Passing(format!("{at}: {io}"), None),
            error => Fault::Passing(format!("{at}: {error}"), None),
        }
    }

    /// Asks until there is an answer that lasts.
    fn patiently<T>(&self, mut ask: impl FnMut() -> Result<T, Fault>) -> Result<T> {
        let mut patience = Patience::new();
        loop {
            match ask() {
                Ok(answer) => return Ok(answer),
                Err(fault) => patience.wait(self, fault)?,
            }
        }
    }
}

/// How often a question is asked again.
pub struct Patience {
    tries: u32,
}

impl Patience {
    pub fn new() -> Self {
        Self { tries: 0 }
    }

    /// Waits for what may pass.
    ///
    /// # Errors
    /// What will not pass, has not passed in all the tries, or comes before the hub has ever answered.
    pub fn wait(&mut self, hub: &Hub, fault: Fault) -> Result<()> {
        let (cause, pause) = match fault {
            Fault::Final(error) => return Err(error),
            Fault::WrongLength(cause) => return Err(Error::Answer(cause)),
            Fault::Passing(cause, pause) => (cause, pause),
        };
        if !hub.answered.get() {
            return Err(Error::Unreachable(cause));
        }
        self.tries += 1;
        if self.tries == TRIES {
            let remedy = "try again later, what has come is kept";
            return Err(Error::Answer(format!("{cause}, {TRIES} times in a row; {remedy}")));
        }
        let pause = pause.unwrap_or(Duration::from_secs(1 << (self.tries - 1))).min(LONGEST_PAUSE);
        hub.say(&format!("{cause}; again in {} s", pause.as_secs()));
        thread::sleep(pause);
        Ok(())
    }
}

const CERTIFICATES: &str =
    "if a proxy stands between, set SSL_CERT_FILE to a file with its certificate; else install ca-certificates";

/// The certificates of authorities that the system trusts.
fn certificates(needed: bool) -> Result<RootCerts> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // Refused if there is one: then that one will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() && needed {
        let cause = found.errors.first().map(|error| format!(" ({error})")).unwrap_or_default();
        let cause = format!("the system has no certificates to know the hub by{cause}");
        return Err(Error::Certificate(format!("{cause}; {CERTIFICATES}")));
    }
    Ok(RootCerts::from(found.certs.iter().map(|certificate| Certificate::from_der(certificate).to_owned())))
}

/// What is wrong with the server's certificate, if the error is about that.
fn invalid_certificate(error: &ureq::Error) -> Option<&CertificateError> {
    let error = match error {
        ureq::Error::Rustls(error) => error,
        ureq::Error::Io(error) => error.get_ref()?.downcast_ref()?,
        _ => return None,
    };
    if let rustls::Error::InvalidCertificate(cause) = error { Some(cause) } else { None }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// An address without what may be secret in it.
fn place(uri: &Uri) -> String {
    format!("{}://{}", uri.scheme_str().unwrap_or_default(), uri.host().unwrap_or_default())
}

fn same_origin(one: &Uri, other: &Uri) -> bool {
    let port = |uri: &Uri| uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    let host = |uri: &Uri| uri.host().unwrap_or_default().to_ascii_lowercase();
    one.scheme() == other.scheme() && host(one) == host(other) && port(one) == port(other)
}

/// Where a redirect of `from` leads.
fn resolved(from: &Uri, location: &str) -> Option<Uri> {
    let location = location.split('#').next()?;
    let (scheme, authority) = (from.scheme_str()?, from.authority()?);
    let folder = from.path().rsplit_once('/')?.0;
    let whole = match location {
        _ if location.starts_with("http://") || location.starts_with("https://") => location.to_owned(),
        _ if location.starts_with("//") => format!("{scheme}:{location}"),
        _ if location.starts_with('/') => format!("{scheme}://{authority}{location}"),
        _ if location.is_empty() || location.split(['/', '?']).next()?.contains(':') => return None,
        _ => format!("{scheme}://{authority}{folder}/{location}"),
    };
    whole.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_is_followed_from_where_it_was_met() {
        let from: Uri = "https://hub:8443/a/b/c?d=e".parse().unwrap();
        for (location, to) in [
            ("http://cdn/x", "http://cdn/x"),
            ("//cdn/x?y=/z#top", "https://cdn/x?y=/z"),
            ("/x", "https://hub:8443/x"),
            ("x/y", "https://hub:8443/a/b/x/y"),
        ] {
            assert_eq!(resolved(&from, location).unwrap(), to, "{location}");
        }
        for location in ["", "ftp://cdn/x", "http://", "/ä ö"] {
            assert_eq!(resolved(&from, location), None, "{location}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let hub: Uri = "https://hub".parse().unwrap();
        for (uri, same) in [
            ("https://HUB/x", true),
            ("https://hub:443/", true),
            ("http://hub/", false),
            ("https://hub:80/", false),
            ("https://hub.evil/", false),
        ] {
            assert_eq!(same_origin(&uri.parse().unwrap(), &hub), same, "{uri}");
        }
    }
}
