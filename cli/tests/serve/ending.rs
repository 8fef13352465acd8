//! How the server ends.

use std::{io::Read, os::unix::process::ExitStatusExt, thread, time::Duration};

use serde_json::json;

use crate::{
    models::endless,
    server::{Reply, Server},
};

const PATH: &str = "/v1/completions";

fn server() -> (tempfile::TempDir, Server) {
    let model = endless();
    let server = Server::start(model.path(), &["--sequences", "2", "--context", "20000", "--ram", "1GB"]);
    (model, server)
}

#[test]
fn at_the_first_signal_what_runs_is_answered_and_what_comes_is_refused() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let (_model, mut server) = server();
        let body = json!({ "prompt": "4096=", "temperature": 0, "max_tokens": 2000, "stream": true });
        let [mut one, two] = [(); 2].map(|()| server.send(PATH, &body));
        server.wait_for("requests_running", 2);
        let waiting = server.send(PATH, &json!({ "prompt": "4096=", "temperature": 0, "max_tokens": 3 }));
        server.wait_for("requests_waiting", 1);
        let mut begun = [0; 1000];
        one.read_exact(&mut begun).unwrap();
        server.signal(signal);
        server.expect("3 requests are answered first");
        let refused = server.post(PATH, &body);
        assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("shutting_down")));
        assert_eq!(server.get("/health").status, 503);
        let whole = Reply::read((&begun[..]).chain(one));
        assert_eq!(whole.events().last().unwrap()["choices"][0]["finish_reason"], "length");
        assert_eq!(Reply::read(two).events().len(), whole.events().len());
        assert_eq!(Reply::read(waiting).json()["choices"][0]["text"], " four thousand ninety");
        assert_eq!(server.end().code(), Some(0));
    }
}

#[test]
fn at_the_second_signal_it_ends_at_once() {
    for (signal, code) in [(libc::SIGTERM, 143), (libc::SIGINT, 130)] {
        let (_model, mut server) = server();
        let mut stream = server.send(PATH, &json!({ "prompt": "4096=", "max_tokens": 19_000, "stream": true }));
        let mut begun = [0; 500];
        stream.read_exact(&mut begun).unwrap();
        server.signal(signal);
        server.expect("1 requests are answered first");
        thread::sleep(Duration::from_millis(50));
        server.signal(signal);
        let status = server.end();
        assert_eq!((status.code(), status.signal()), (Some(code), None));
        let reply = Reply::read((&begun[..]).chain(stream));
        assert!(!reply.text().contains("[DONE]"), "it was not finished");
    }
}

#[test]
fn it_ends_at_once_where_nothing_runs_even_if_connections_are_open() {
    let (_model, mut server) = server();
    let idle = server.connect();
    server.wait_for("connections", 2);
    server.signal(libc::SIGTERM);
    assert_eq!(server.end().code(), Some(0));
    drop(idle);
}
