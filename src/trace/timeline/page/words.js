// Numbers and spans in words.

const SPACE = "\u202f";

/** As few digits as tell a value apart to `digits` places. */
function rounded(value, digits) {
  if (value === 0) return "0";
  const places = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(value))));
  return value.toFixed(Math.min(places, 9));
}

const TIME_UNITS = [[1e9, "s"], [1e6, "ms"], [1e3, "µs"], [1, "ns"]];

function timeUnit(nanos) {
  return TIME_UNITS.find(([size]) => Math.abs(nanos) >= size) ?? TIME_UNITS[3];
}

/** A length of time, to three digits. */
function duration(nanos) {
  if (nanos === 0) return `0${SPACE}s`;
  const [size, unit] = timeUnit(nanos);
  return `${rounded(nanos / size, 3)}${SPACE}${unit}`;
}

/** A moment, precise enough for a scale with such a step, in the unit of the scale's end. */
function moment(nanos, step, end = nanos) {
  const [size, unit] = timeUnit(Math.max(end, step));
  const places = Math.max(0, Math.ceil(Math.log10(size / step) - 1e-9));
  return `${(nanos / size).toFixed(places)}${SPACE}${unit}`;
}

/** Seconds as the address has them. */
function seconds(nanos) {
  return (nanos / 1e9).toFixed(9).replace(/\.?0+$/, "");
}

function size(bytes) {
  const [unit, name] = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([unit]) => bytes >= unit) ?? [1, "B"];
  return `${rounded(bytes / unit, 3)}${SPACE}${name}`;
}

function rate(gbPerS) {
  return `${rounded(gbPerS, 3)}${SPACE}GB/s`;
}

function percent(share) {
  if (share > 0 && share < 0.005) return `<${SPACE}1${SPACE}%`;
  return `${Math.round(share * 100)}${SPACE}%`;
}

/** Whose time a lane is. */
function whose(lane) {
  if (lane.device) return "device stream";
  return lane.enqueues ? "thread, enqueues" : "thread";
}

/** What a lane's stage waits for in each kind of wait. */
function waitsFor(recording, lane) {
  const ring = recording.rings.find((ring) => ring.stage === lane.stage);
  return {
    starved: lane.before ? `for ${lane.before}` : "for work",
    blocked: ring ? `for one of ${ring.slots} ${ring.name}` : "for a slot",
  };
}

/** Where a lane's time went in a window. */
function shares(lane, from, to) {
  const share = (growth) => growth.within(from, to) / (to - from);
  const [busy, starved, blocked] = [share(lane.busy), share(lane.starved), share(lane.blocked)];
  return { busy, starved, blocked, idle: Math.max(0, 1 - busy - starved - blocked) };
}

/** The same in words. */
function inWords(recording, lane, part) {
  const least = 0.005;
  const waits = waitsFor(recording, lane);
  const said = [];
  if (part.starved >= least) said.push(`${percent(part.starved)} ${waits.starved}`);
  if (part.blocked >= least) said.push(`${percent(part.blocked)} ${waits.blocked}`);
  const verb = lane.enqueues ? "Enqueued" : "At work";
  const work = part.busy > 1 - least ? `${verb} all the time` : `${verb} ${percent(part.busy)}`;
  const waited = said.length ? `, waited ${said.join(" and ")}` : "";
  if (part.busy < least && !said.length) return "Nothing to do";
  return work + waited + (lane.device || part.idle < 0.02 ? "" : `, idle ${percent(part.idle)}`) + ".";
}

function unitName(recording, span) {
  return recording.units[span.unit]?.name ?? `unit ${span.unit}`;
}

/** A span as a headline and lines of name and value. */
function spanInWords(recording, span) {
  const length = duration(span.end - span.start);
  const when = ["when", `${moment(span.start, 1e3)} to ${moment(span.end, 1e3)}`];
  const lane = ["lane", `${span.lane.stage}, ${whose(span.lane)}`];
  if (span.unit < 0) {
    const kind = span.unit === STARVED ? "starved" : "blocked";
    return [`${kind}: waits ${waitsFor(recording, span.lane)[kind]}`, [["for", length], when, lane]];
  }
  const unit = recording.units[span.unit];
  const lines = [["pass", String(span.pass)], ["took", length], when];
  if (span.bytes > 0) {
    lines.push(["bytes", size(span.bytes)]);
    if (span.end > span.start) lines.push(["pace", rate(span.bytes / (span.end - span.start))]);
  }
  if (unit?.tier) lines.push(["kept", unit.tier]);
  return [unitName(recording, span), [...lines, lane]];
}
