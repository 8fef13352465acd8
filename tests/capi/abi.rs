//! The binary interface, as a stored list: what a host was compiled with must fit every later library of the same major version.

use std::{
    collections::BTreeSet,
    env, fs,
    mem::{self, offset_of},
    path::Path,
    process::Command,
};

use layer_streamer::capi::*;

use crate::host::{C11, libraries, printed};

const REMEDY: &str = "a line gone or changed breaks hosts that are compiled, a new one does not; to store the list anew: \
                      LAYER_STREAMER_WRITE_ABI=1 cargo test --features capi --test capi abi";

#[test]
fn the_interface_is_the_stored_one_in_the_header_in_rust_and_in_the_libraries() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let header = root.join("include/layer_streamer.h");
    let declared = declarations(&header);
    let folder = support::folder();
    let [source, program] = ["abi.c", "abi"].map(|name| folder.path().join(name));
    fs::write(&source, host_that_prints(&declared)).unwrap();
    C11.compile(&source, &program);
    let types = printed(&mut Command::new(program));
    // Rust spells the type of a field otherwise.
    let measures = types.lines().map(|line| line.split(',').next().unwrap_or(line).to_owned()).collect();
    assert_same("the header's types, and Rust's", &measures, &for_rust().into_iter().collect());

    let functions: Vec<_> = declared.into_iter().filter(|text| text.contains('(')).collect();
    let exported = functions.iter().filter(|text| !text.starts_with("typedef"));
    let name =
        |text: &String| text.split('(').next().and_then(|text| text.rsplit([' ', '*']).next()).map(str::to_owned);
    let exported = exported.filter_map(name).collect();
    let symbols = |library: &str, of: &str| -> Vec<String> {
        let listed = printed(Command::new("nm").args([of, "--defined-only"]).arg(libraries().join(library)));
        // Address, kind, name.
        listed.lines().filter_map(|line| line.split_whitespace().nth(2).map(str::to_owned)).collect()
    };
    let shared = symbols("liblayer_streamer.so", "-D").into_iter().collect();
    assert_same("what the shared library exports, and the header's functions", &shared, &exported);
    // It also holds all that the crate is built of.
    let archived = symbols("liblayer_streamer.a", "-g").into_iter().filter(|name| name.starts_with("ls_")).collect();
    assert_same("what the static library holds, and the header's functions", &archived, &exported);

    let functions = functions.into_iter().map(|text| match text.starts_with("typedef") {
        true => text,
        false => format!("function {text}"),
    });
    let found: BTreeSet<_> = types.lines().map(str::to_owned).chain(functions).collect();
    let path = root.join("tests/capi/abi.txt");
    if env::var_os("LAYER_STREAMER_WRITE_ABI").is_some() {
        fs::write(&path, found.iter().flat_map(|line| [line, "\n"]).collect::<String>()).unwrap();
    }
    let stored = fs::read_to_string(&path).unwrap().lines().map(str::to_owned).collect();
    assert_same(&format!("the interface as it is, and as it is stored; {REMEDY}"), &found, &stored);
}

fn assert_same(what: &str, left: &BTreeSet<String>, right: &BTreeSet<String>) {
    let only = |sign: char, a: &BTreeSet<String>, b: &BTreeSet<String>| -> String {
        a.difference(b).map(|line| format!("\n{sign} {line}")).collect()
    };
    assert!(left == right, "{what}:{}{}", only('+', left, right), only('-', right, left));
}

/// What the header declares and defines, each on a line.
fn declarations(header: &Path) -> Vec<String> {
    let text = printed(Command::new("cc").args(["-std=c11", "-E", "-P"]).arg(header));
    let (mut declared, mut now, mut depth) = (Vec::new(), String::new(), 0);
    for character in text.chars() {
        depth += i32::from(character == '{') - i32::from(character == '}');
        if character == ';' && depth == 0 {
            declared.push(mem::take(&mut now).split_whitespace().collect::<Vec<_>>().join(" "));
        } else {
            now.push(character);
        }
    }
    declared.retain(|text| text.contains("ls_"));
    let header = fs::read_to_string(header).unwrap();
    // Versions change with each release, and break nothing.
    let numbers = header.lines().filter(|line| line.starts_with("#define LS_") && !line.contains("VERSION"));
    declared.extend(numbers.map(str::to_owned));
    declared
}

/// A program in C that prints the types that are declared: codes, sizes, alignments and offsets.
fn host_that_prints(declared: &[String]) -> String {
    let mut lines = Vec::new();
    for text in declared {
        let (head, body) = text.split_once('{').map_or((text.as_str(), ""), |(head, rest)| {
            (head.trim(), rest.rsplit_once('}').map_or(rest, |(body, _)| body))
        });
        if let Some(name) = head.strip_prefix("enum ") {
            let codes = body.split(',').filter_map(|code| code.split_whitespace().next());
            lines.extend(codes.map(|code| format!(r#"printf("enum {name} {code} = %d\n", {code});"#)));
        } else if let Some(rest) = head.strip_prefix("#define ") {
            let name = rest.split(' ').next().unwrap_or(rest);
            lines.push(format!(r#"printf("number {name} = %d\n", {name});"#));
        } else if let Some(name) = head.strip_prefix("typedef struct ") {
            lines.push(format!(
                r#"printf("struct {name}: %zu bytes aligned to %zu\n", sizeof({name}), _Alignof({name}));"#
            ));
            for field in body.split(';').map(str::trim).filter(|field| !field.is_empty()) {
                let bare = field.split('[').next().unwrap_or(field);
                let of = bare.rsplit([' ', '*']).next().unwrap_or(bare);
                lines.push(format!(
                    r#"printf("struct {name}.{of}: %zu bytes at %zu, {field}\n", sizeof((({name} *)0)->{of}), offsetof({name}, {of}));"#
                ));
            }
        }
    }
    format!("#include <stdio.h>\n#include \"layer_streamer.h\"\nint main(void) {{\n{}\n}}\n", lines.join("\n"))
}

/// How many bytes a field has.
fn bytes<S, F>(_: impl FnOnce(S) -> F) -> usize {
    size_of::<F>()
}

/// The same of Rust's types.
macro_rules! measured {
    ($($kind:ident $name:ident { $($part:ident),+ $(,)? })+) => {
        vec![$(measured!(@$kind $name $($part)+)),+].concat()
    };
    (@enum $name:ident $($code:ident)+) => {
        vec![$(format!("enum {} {} = {}", stringify!($name), stringify!($code), $name::$code as i32)),+]
    };
    (@number $name:ident $value:ident) => {
        vec![format!("number {} = {}", stringify!($name), $name as $value)]
    };
    (@struct $name:ident $($field:ident)+) => {{
        let (name, bytes_of) = (stringify!($name), size_of::<$name>());
        vec![
            format!("struct {name}: {bytes_of} bytes aligned to {}", align_of::<$name>()),
            $({
                let (bytes, at) = (bytes(|it: $name| it.$field), offset_of!($name, $field));
                format!("struct {name}.{}: {bytes} bytes at {at}", stringify!($field))
            }),+
        ]
    }};
}

fn for_rust() -> Vec<String> {
    measured! {
    number LS_END { i32 }
    number LS_PAGE { usize }
    enum ls_status {
        LS_OK, LS_NULL, LS_INVALID, LS_CLOSED, LS_BUSY, LS_PANICKED, LS_CALLBACK, LS_IO, LS_CHECKPOINT, LS_READ, LS_MEMORY,
        LS_THREAD, LS_NO_TENSOR, LS_LAYERS_HELD, LS_CANCELLED, LS_KERNEL, LS_CUDA, LS_UNSUPPORTED, LS_LEAKED, LS_TOO_LITTLE,
    }
    enum ls_dtype {
        LS_AS_STORED, LS_BOOL, LS_U8, LS_I8, LS_F8_E4M3, LS_F8_E5M2, LS_U16, LS_I16, LS_F16, LS_BF16, LS_U32, LS_I32, LS_F32,
        LS_U64, LS_I64, LS_F64, LS_Q4_0, LS_Q4_1, LS_Q5_0, LS_Q5_1, LS_Q8_0, LS_Q2_K, LS_Q3_K, LS_Q4_K,
        LS_Q5_K, LS_Q6_K, LS_IQ4_NL, LS_IQ4_XS, LS_MXFP4,
        LS_F8_64, LS_U4_32, LS_U4_128, LS_NF4_64,
    }
    enum ls_tier { LS_TIER_DISK, LS_TIER_RAM, LS_TIER_PINNED, LS_TIER_GPU, LS_TIER_GPU_PACKED, LS_TIER_PINNED_PACKED }
    enum ls_reader { LS_READER_AUTO, LS_READER_URING_FIXED, LS_READER_URING, LS_READER_PREAD }
    enum ls_cache { LS_CACHE_AUTO, LS_CACHE_DIRECT, LS_CACHE_BUFFERED }
    enum ls_pack { LS_PACK_AUTO, LS_PACK_NEVER, LS_PACK_ALWAYS }
    enum ls_log_level { LS_LOG_INFO, LS_LOG_WARNING, LS_LOG_ERROR }
    enum ls_rope_layout { LS_ROPE_HALVES, LS_ROPE_INTERLEAVED, LS_ROPE_TO_HALVES }
    enum ls_event_kind {
        LS_EVENT_TOKEN, LS_EVENT_STOP, LS_EVENT_MOST, LS_EVENT_CONTEXT, LS_EVENT_CANCELLED, LS_EVENT_FAILED,
    }
    struct ls_checkpoint { id }
    struct ls_stored_tensor { name, file, offset, shape, rank, dtype }
    struct ls_device { id }
    struct ls_precision { activation, cache, weight }
    struct ls_stream { id }
    struct ls_unit_tensor { name, stored, dtype, rows, columns }
    struct ls_unit { name, tensors, count, tier }
    struct ls_progress { passes, done, units, bytes }
    struct ls_streamer_options {
        size, n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, reader, cache, units, unit_count, tiers,
        progress, progress_user, log, log_user, ram_memory, ram_bytes, pinned_memory, pinned_bytes, gpu_memory, gpu_bytes,
        host_budget, device_budget, trace, pack,
    }
    struct ls_memory { size, ram, pinned, gpu, staging }
    struct ls_placement {
        size, n_gpu, n_cpu_pinned, n_cpu, batch_gpu, batch_cpu_pinned, batch_cpu, units, units_disk, units_ram, units_pinned,
        units_gpu, host_bytes, device_bytes, least_host_bytes, least_device_bytes, units_gpu_packed,
        units_pinned_packed,
    }
    struct ls_streamer { id }
    struct ls_unit_info { name, tensors, bytes }
    struct ls_stage_stats { units, bytes, busy_ns, starved_ns, blocked_ns }
    struct ls_stats { size, read, pin, transfer, compute, direct_bytes, buffered_bytes, reader, mapped_bytes }
    struct ls_statics { id }
    struct ls_tensor { data, dtype, rank, shape }
    struct ls_layer { id }
    struct ls_ragged { q_offsets, kv_lens, pages }
    struct ls_model_options { size, batch, context, streamer }
    struct ls_model { id }
    struct ls_model_info { size, vocab, hidden, layers, max_positions, context, batch }
    struct ls_sampling { size, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, seed }
    struct ls_sequence { row, tokens, count }
    struct ls_engine { id }
    struct ls_engine_options { size, waiting, delay }
    struct ls_request { size, prompt, count, most, stop, stop_count, sampling, number, priority }
    struct ls_event { kind, token, status, message }
    struct ls_engine_stats {
        size, waiting, running, ended, passes, prompt_tokens, reused_tokens, new_tokens, put_back,
    }
    }
}
