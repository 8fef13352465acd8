//! What is set aside for requests on their way, as those meet it that want more, and those beside them.

use std::{
    io::Read,
    net::TcpStream,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    models::endless,
    server::{PATIENCE, Reply, Server},
};

/// What is set aside, in bytes.
const ROOM: usize = 64 << 20;

/// What a token of a prompt takes of it, for each answer, in bytes.
const PROMPT_TOKEN: usize = 8;

/// Prompts that wait: so many tokens, and answers to each. With many of the first, some of the second and so on all of the room is
/// taken but what a few tokens of an answer take.
const WAITING: [(usize, usize); 5] = [(1950, 128), (1950, 16), (1950, 2), (250, 1), (30, 1)];

/// The most tokens of an answer that takes much.
const MOST: u64 = 1600;

/// A request of which more is kept than a plain answer of the whole context takes: the prompts of those that wait alone are that.
fn greedy(stream: bool) -> Value {
    let turn = json!({ "role": "user", "content": "7".repeat(350) });
    json!({ "messages": [turn], "n": 128, "max_tokens": MOST, "temperature": 0, "stream": stream })
}

fn modest(tokens: usize) -> Value {
    json!({ "prompt": "4096=", "temperature": 0, "max_tokens": tokens })
}

/// Has prompts wait until one more is refused.
fn fill(server: &Server, (tokens, answers): (usize, usize)) -> Vec<TcpStream> {
    let body = json!({ "prompt": vec![23; tokens], "n": answers, "stream": true });
    let mut waiting = Vec::new();
    loop {
        let mut stream = server.send("/v1/completions", &body);
        let mut begun = [0; 12];
        stream.read_exact(&mut begun).unwrap();
        if begun != *b"HTTP/1.1 200" {
            let refused = Reply::read((&begun[..]).chain(stream));
            assert_eq!((refused.status, refused.headers["retry-after"].as_str()), (503, "1"), "{}", refused.text());
            assert_no_room(&refused.json());
            return waiting;
        }
        waiting.push(stream);
        assert!(waiting.len() * tokens * answers * PROMPT_TOKEN <= ROOM, "more waits than there is room for");
    }
}

fn assert_no_room(said: &Value) {
    let error = &said["error"];
    assert_eq!((&error["code"], &error["type"]), (&json!("no_room"), &json!("server_error")), "{said}");
    assert!(error["message"].as_str().unwrap().contains("ask again later"), "{said}");
}

/// Waits until a figure is more than it was.
fn wait_for_more(server: &Server, name: &str, before: u64) {
    let deadline = Instant::now() + PATIENCE;
    while server.figure(name) <= before {
        assert!(Instant::now() < deadline, "{name} is {before} for long");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn where_the_room_is_full_what_takes_much_ends_and_what_takes_little_is_answered() {
    let model = endless();
    // What a stream begins with has the name for each answer: more than the system keeps for a client that takes nothing.
    let name = "endless ".repeat(800);
    let options = ["--sequences", "1", "--context", "2000", "--queue", "5000", "--name", &name, "--ram", "2GB"];
    let server = Server::start(model.path(), &[&options[..], &["--patience", "60"]].concat());
    for stream in [true, false] {
        let (ended, new) = (server.figure("requests_ended_total"), server.figure("new_tokens_total"));
        let refused = server.send("/v1/chat/completions", &greedy(stream));
        wait_for_more(&server, "new_tokens_total", new);
        let answered = server.send("/v1/completions", &modest(5));
        server.wait_for("requests_waiting", 128);
        // Runs when that is answered, in place of the long prompts, whose passes would take long.
        let next = server.send("/v1/completions", &modest(1900));
        server.wait_for("requests_waiting", 129);
        let waiting: Vec<_> = WAITING.into_iter().flat_map(|prompts| fill(&server, prompts)).collect();
        // The next token of the one that runs finds no room.
        wait_for_more(&server, "requests_ended_total", ended);
        assert!(server.figure("new_tokens_total") < new + MOST, "it ends as it has all its tokens");
        let reply = Reply::read(refused);
        if stream {
            let text = reply.text();
            let events: Vec<Value> = text
                .split_terminator("\n\n")
                .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
                .collect();
            let (last, before) = events.split_last().unwrap();
            assert!(reply.status == 200 && before.len() >= 128, "it had begun: {text}");
            assert_no_room(last);
        } else {
            assert_eq!(reply.status, 503, "{}", reply.text());
            assert_no_room(&reply.json());
        }
        // Its place is another's, beside prompts that still take the room.
        let reply = Reply::read(answered);
        assert_eq!((reply.status, &reply.json()["choices"][0]["text"]), (200, &json!(" four thousand ninety-six")));
        drop(waiting);
        server.wait_for("requests_waiting", 0);
        drop(next);
        server.wait_for("connections", 1);
    }
    // All of it is free again.
    let running = server.send("/v1/completions", &modest(1900));
    server.wait_for("requests_running", 1);
    let (tokens, answers) = WAITING[0];
    let waiting = fill(&server, WAITING[0]);
    assert_eq!(waiting.len(), ROOM / (tokens * answers * PROMPT_TOKEN));
    drop(waiting);
    server.wait_for("requests_waiting", 0);
    drop(running);
    assert_eq!(server.completed(&modest(5)), " four thousand ninety-six");
}
