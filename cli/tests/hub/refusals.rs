//! What is refused, with which remedy, and that nothing half is left behind.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::symlink,
    process::{Command, Output},
};

use support::limits::in_child;
use support::mounts::{fill, mount, own_mounts};
use support::{folder, speller};

use crate::{
    server::{Answer, COMMIT, Servers, etag, held},
    world::{FIRST, SECOND, TEXT, World, assert_says, only, ranges, right, spoilt, text},
};

#[test]
fn a_file_of_another_length_or_hash_is_refused_and_deleted() {
    let longer = |mut answer: Answer| {
        answer.body.push(0);
        answer
    };
    let shorter = |mut answer: Answer| {
        answer.body.pop();
        answer
    };
    let other = |mut answer: Answer| {
        answer.body[1000] ^= 1;
        answer
    };
    // It does not say how long it is.
    let unsaid = move |answer| longer(answer).with("Content-Length", "");
    for (hub, cause) in [
        (spoilt(FIRST, 9, longer), "has 1669937 bytes, not the 1669936 that the hub announced"),
        (spoilt(FIRST, 9, shorter), "has 1669935 bytes, not the 1669936 that the hub announced"),
        (spoilt(FIRST, 9, unsaid), "more than the 1669936 bytes come that the hub announced"),
        (spoilt(FIRST, 9, other), "has another hash than the hub announced"),
    ] {
        let world = World::new(&hub);
        assert_says(&world.refusal(), &[FIRST, cause, "deleted", "try again"]);
        assert!(!world.partial(FIRST).exists(), "{cause}");
        assert!(!world.whole().contains(FIRST), "{cause}");
        world.with(&right()).prints();
    }
}

#[test]
fn each_refusal_of_the_hub_has_its_remedy() {
    for (answer, parts) in [
        (Answer::status(401), &["no model org/speller", "does not exist, or is private or gated", "set HF_TOKEN"][..]),
        (
            Answer::status(403).with("X-Error-Code", "GatedRepo"),
            &["is gated", "accept its licence at http", "set HF_TOKEN"],
        ),
        (Answer::status(404), &["no such model or revision", "404", "no folder either"]),
        (Answer::status(404).with("X-Error-Code", "RevisionNotFound"), &["no such revision"]),
        (Answer::status(429).with("Retry-After", "0"), &["answers 429", "5 times in a row"]),
        (Answer::status(500).with("Retry-After", "0"), &["answers 500", "5 times in a row"]),
        (Answer::status(418), &["answers 418", "HF_ENDPOINT"]),
        (Answer::status(302).with("Location", "/again"), &["more than 10 redirects"]),
        (Answer::status(302), &["points to no address"]),
        (Answer { body: b"<html>".to_vec(), ..Answer::status(200) }, &["makes no sense"]),
    ] {
        let hub = only(answer);
        let world = World::new(&hub);
        assert_says(&world.refusal(), parts);
        assert!(!world.cache.path().join("hub").exists(), "{parts:?}");
    }
}

#[test]
fn names_that_lead_out_of_the_models_folder_are_refused() {
    let listing = |files: &'static str| {
        let body = format!(r#"{{"sha": "{COMMIT}", "siblings": [{files}]}}"#).into_bytes();
        Servers::start(move |asked, answer| match asked.path.starts_with("/api/") {
            true => Answer { body: body.clone(), ..Answer::status(200) },
            false => answer,
        })
    };
    for file in ["../evil", "a/../../evil", "/evil", "a//evil", "..\\\\evil"] {
        let file = format!(r#"{{"rfilename": "config.json"}}, {{"rfilename": "{file}"}}"#);
        let world = World::new(&listing(file.leak()));
        assert_says(&world.refusal(), &["evil", "outside the model's folder", "nothing is taken"]);
        assert!(!world.cache.path().join("hub").exists());
    }
    // Names that the hub's other answers give to files.
    let index = br#"{"weight_map": {"a": "../evil.safetensors"}}"#;
    let hub = Servers::start(move |asked, answer| match asked.path.ends_with("index.json") {
        true => Answer { body: index.to_vec(), ..answer },
        false => answer,
    });
    let world = World::new(&hub);
    let done = world.generate().output().unwrap();
    assert_says(&text(&done.stderr), &["model.safetensors.index.json", "no plain file name"]);
    let hub = Servers::start(|asked, answer| match asked.path.ends_with("tokenizer.json") {
        true => answer.with("ETag", "\"../../evil\""),
        false => answer,
    });
    assert_says(&World::new(&hub).refusal(), &["tokenizer.json", "no ETag"]);
    let hub = only(Answer { body: br#"{"sha": "../evil", "siblings": []}"#.to_vec(), ..Answer::status(200) });
    assert_says(&World::new(&hub).refusal(), &["no commit"]);
}

#[test]
fn a_model_without_safetensors_is_refused_with_what_it_has() {
    let files = ["config.json", "pytorch_model.bin", "q4.gguf", "README.md"];
    let files = files.map(|file| format!(r#"{{"rfilename": "{file}"}}"#)).join(",");
    let body = format!(r#"{{"sha": "{COMMIT}", "siblings": [{files}]}}"#).into_bytes();
    let hub = only(Answer { body, ..Answer::status(200) });
    let said = World::new(&hub).refusal();
    assert_says(
        &said,
        &["neither", "but pytorch_model.bin, q4.gguf;", "name a repository of this model that has safetensors"],
    );
    assert_eq!(hub.asked().len(), 1, "nothing is taken");
}

#[test]
fn a_full_disk_is_known_before_the_weights_are_begun() {
    let name = "refusals::a_full_disk_is_known_before_the_weights_are_begun";
    if !in_child(name) || !own_mounts() {
        return;
    }
    let hub = right();
    let world = World::new(&hub);
    // Room for what is small.
    mount("none", world.cache.path(), Some("tmpfs"), 0, "size=1m").unwrap();
    let said = world.refusal();
    assert_says(&said, &["models--org--speller: ", "MB are missing: the model takes 3.25 MB more", "HF_HUB_CACHE"]);
    assert!(hub.asked().iter().all(|asked| asked.of_hub), "no weights are asked for");
    // Room for nothing.
    let world = World::new(&hub);
    fill(world.cache.path());
    assert_says(&world.refusal(), &[" are missing: the model takes ", "free some, or set HF_HUB_CACHE"]);
    // A disk that fills up meanwhile: by what it says itself, as much as is needed is free.
    let cache = folder();
    mount("none", cache.path(), Some("tmpfs"), 0, "size=3600k").unwrap();
    let filler = cache.path().join("filler");
    let hub = Servers::start(move |asked, answer| {
        if asked.is_bytes_of(FIRST) {
            fs::write(&filler, vec![0; 3 << 20]).unwrap();
        }
        answer
    });
    let world = World { cache, ..World::new(&hub) };
    assert_says(&world.refusal(), &[".incomplete", "No space left on device", "MB more are needed"]);
    fs::remove_file(world.cache.path().join("filler")).unwrap();
    world.with(&right()).prints();
}

#[test]
fn a_file_that_another_process_has_begun_anew_gets_no_name() {
    let place = folder();
    let partial = place.path().join("hub/models--org--speller/blobs").join(format!("{}.incomplete", etag(FIRST)));
    let begun_anew = partial.clone();
    // As it happens where locks do nothing.
    let hub = spoilt(FIRST, 1, move |answer| {
        fs::remove_file(&begun_anew).unwrap();
        fs::write(&begun_anew, &held(FIRST)[..1000]).unwrap();
        answer
    });
    let world = World { cache: place, ..World::new(&hub) };
    assert_says(&world.refusal(), &[".incomplete", "locks do nothing", "try again"]);
    assert_eq!(fs::read(partial).unwrap(), held(FIRST)[..1000]);
    world.with(&right()).prints();
}

#[test]
fn a_name_without_an_owner_and_a_folder_that_is_missing_are_not_asked_for() {
    let hub = right();
    let world = World::new(&hub);
    let refusal = |model: &str| {
        let done = world.command("generate", model).args(["--quiet", "4096="]).output().unwrap();
        assert!(!done.status.success());
        text(&done.stderr)
    };
    let said = refusal("speller");
    assert_says(&said, &["speller: there is no such folder", "layer-streamer generate --model ORG/speller"]);
    for folder in ["./org/speller", "/org/speller", "~/speller", "a/b/c"] {
        assert_says(&refusal(folder), &[folder, "config.json", "No such file"]);
    }
    assert!(hub.asked().is_empty());
    // A folder is a folder, whatever its name looks like.
    let place = folder();
    fs::create_dir(place.path().join("org")).unwrap();
    symlink(speller(), place.path().join("org/speller")).unwrap();
    let done = world.generate().current_dir(place.path()).output().unwrap();
    assert_eq!(text(&done.stdout), TEXT, "{}", text(&done.stderr));
    assert!(hub.asked().is_empty());
}

#[test]
fn offline_and_not_in_the_cache_is_refused_with_the_command_that_downloads() {
    let hub = right();
    let offline = |world: &World| {
        let done = world.generate().env("HF_HUB_OFFLINE", "1").output().unwrap();
        assert!(!done.status.success());
        text(&done.stderr)
    };
    let world = World::new(&hub);
    let online = "HF_HUB_OFFLINE=0 ";
    assert_says(&offline(&world), &["org/speller is not in the cache", online, "generate --model org/speller"]);
    assert!(hub.asked().is_empty());
    // Nor is a part of it enough.
    world.prints();
    fs::remove_file(world.model("snapshots").join(COMMIT).join(SECOND)).unwrap();
    assert_says(&offline(&world), &["or not all of it", online]);
    // The blob is there, so nothing comes but the link.
    world.prints();
    assert_eq!(ranges(&hub.asked(), SECOND), [None]);
}

#[test]
fn no_network_is_said_at_once() {
    let world = World::new(&right()).without_network();
    assert_says(&world.refusal(), &["cannot reach http://127.0.0.1", "refused", "check the network"]);
    // Somebody who takes the call and never speaks.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let world = World { hub: format!("http://{}", silent.local_addr().unwrap()), ..world };
    let output = |command: &mut Command| command.env("HF_HUB_DOWNLOAD_TIMEOUT", "0.2").output().unwrap();
    let Output { stderr, .. } = output(&mut world.generate());
    assert_says(&text(&stderr), &["cannot reach http://127.0.0.1", "check the network"]);
}
