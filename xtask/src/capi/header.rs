//! `include/layer_streamer.h` is made of the sources in `src/capi` by cbindgen. It lies here, since cbindgen is more than all that
//! `cargo test` needs besides.

use std::{env, fs};

use crate::run::root;

/// The sources of the header, in its order.
const SOURCES: [&str; 13] = [
    "ffi",
    "checkpoint",
    "device",
    "callbacks",
    "units",
    "options",
    "budget",
    "streamer",
    "layers",
    "kernels",
    "sampling",
    "model",
    "engine",
];

#[test]
fn the_header_is_what_the_sources_declare() {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    let sources = SOURCES.map(|name| root().join(format!("src/capi/{name}.rs")));
    let builder = sources.iter().fold(cbindgen::Builder::new().with_config(config), |b, path| b.with_src(path));
    let mut made = Vec::new();
    builder.generate().unwrap().write(&mut made);
    let made = String::from_utf8(made).unwrap();
    let path = root().join("include/layer_streamer.h");
    if env::var_os("LAYER_STREAMER_WRITE_HEADER").is_some() {
        fs::write(&path, &made).unwrap();
    }
    let remedy = "it is not: LAYER_STREAMER_WRITE_HEADER=1 cargo test -p xtask the_header";
    assert!(fs::read_to_string(&path).unwrap() == made, "{remedy}");
    let declared = made.matches("\nls_status ls_").count() + made.matches("\nuint32_t ls_").count();
    assert!(declared + made.matches("\nconst char *ls_").count() > 50);
}
