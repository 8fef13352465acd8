//! The C API as its users meet it.

use std::{env, fs, path::Path};

/// The sources of the header, in its order.
const SOURCES: [&str; 8] = ["border", "checkpoint", "device", "options", "streamer", "layers", "kernels", "model"];

#[test]
fn the_header_is_what_the_sources_declare() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let sources = SOURCES.map(|name| root.join(format!("src/capi/{name}.rs")));
    let builder = sources.iter().fold(cbindgen::Builder::new().with_config(config), |b, path| b.with_src(path));
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let made = String::from_utf8(made).unwrap();
    let path = root.join("include/layer_streamer.h");
    if env::var_os("LAYER_STREAMER_WRITE_HEADER").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, &made).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap();
    assert!(
        committed == made,
        "it is not: LAYER_STREAMER_WRITE_HEADER=1 cargo test --features capi --test capi the_header"
    );
}
