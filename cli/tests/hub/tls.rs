//! The hub behind HTTPS: whom the program trusts.

use std::{
    net::TcpStream,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use support::folder;

use crate::{
    server::{Answer, Asked, Connection, Servers},
    world::{World, assert_says, text},
};

/// Made by `make.sh` in the same folder.
fn data(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/tls").join(file)
}

/// The server's side of TLS, as `localhost`.
fn wrap(connection: TcpStream) -> Box<dyn Connection> {
    static CONFIG: LazyLock<Arc<ServerConfig>> = LazyLock::new(|| {
        let certificate = CertificateDer::from_pem_file(data("server.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(data("server.key")).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(default_provider()));
        let config = config.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
        Arc::new(config.with_single_cert(vec![certificate], key).unwrap())
    });
    Box::new(StreamOwned::new(ServerConnection::new(CONFIG.clone()).unwrap(), connection))
}

fn servers(twist: impl Fn(&Asked, Answer) -> Answer + Send + Sync + 'static) -> Servers {
    Servers::behind("https://localhost", wrap, twist)
}

#[test]
fn a_hub_of_a_trusted_authority_gives_its_model() {
    let hub = servers(|_, answer| answer);
    World { authority: Some(data("authority.pem")), ..World::new(&hub) }.prints();
}

#[test]
fn a_hub_that_no_trusted_authority_knows_is_refused() {
    let hub = servers(|_, answer| answer);
    let remedy = "set SSL_CERT_FILE to a file with its certificate; else install ca-certificates";
    let world = World::new(&hub);
    assert_says(&world.refusal(), &[&hub.address, "UnknownIssuer", remedy]);
    // A machine without any authority.
    let nothing = folder();
    let done = world.generate().env("SSL_CERT_DIR", nothing.path()).output().unwrap();
    assert_says(&text(&done.stderr), &["the system has no certificates", remedy]);
    assert!(hub.asked().is_empty(), "the token may go with a question");
}

#[test]
fn a_hub_under_another_name_than_its_certificates_is_refused() {
    let hub = servers(|_, answer| answer);
    let address = hub.address.replace("localhost", "127.0.0.1");
    let world = World { authority: Some(data("authority.pem")), hub: address.clone(), ..World::new(&hub) };
    assert_says(&world.refusal(), &[&address, "not valid for name", "localhost", "check HF_ENDPOINT"]);
    assert!(hub.asked().is_empty(), "the token may go with a question");
}

#[test]
fn a_hub_that_points_away_from_https_is_not_followed() {
    let hub = servers(|asked, answer| match asked.path.ends_with(".safetensors") {
        true => answer.with("Location", "http://localhost/file"),
        false => answer,
    });
    let world = World { authority: Some(data("authority.pem")), ..World::new(&hub) };
    assert_says(&world.refusal(), &["points from https to http://localhost, which is not followed"]);
}
