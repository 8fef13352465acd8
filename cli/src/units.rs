//! Amounts, rates and times for people: SI prefixes (k, M, G = 10³, 10⁶, 10⁹), three significant digits.

/// An amount of memory or data, such as `776 B` or `21.4 MB`.
pub fn bytes(count: u64) -> String {
    if count < 1000 { format!("{count} B") } else { si(count as f64, "B") }
}

/// Such as `1.63 GB/s`.
pub fn rate(bytes_per_second: f64) -> String {
    si(bytes_per_second, "B/s")
}

/// A time, such as `52.1 ns` or `3.40 s`.
pub fn seconds(seconds: f64) -> String {
    si(seconds, "s")
}

/// A number of things, such as `12.3 M`.
pub fn count(count: f64) -> String {
    si(count, "").trim_end().to_owned()
}

/// Three significant digits, and no fewer before the point than there are.
pub fn significant(value: f64) -> String {
    let decimals = match value.abs() {
        // What rounds up to the next power of ten has its digits.
        value if value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        value if value >= 0.9995 || value == 0.0 => 2,
        value if value >= 0.09995 => 3,
        _ => 4,
    };
    format!("{value:.decimals$}")
}

fn si(value: f64, unit: &str) -> String {
    const PREFIXES: [(f64, &str); 8] =
        [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n")];
    // 999.6 MB is 1.00 GB.
    let fits = |(scale, _): &(f64, &str)| value.abs() >= 0.9995 * scale;
    let (scale, prefix) = PREFIXES.into_iter().find(fits).unwrap_or(if value == 0.0 { (1.0, "") } else { PREFIXES[7] });
    format!("{} {prefix}{unit}", significant(value / scale))
}
