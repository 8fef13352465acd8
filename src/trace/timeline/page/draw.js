// Paints lanes, charts and scales. A frame is { view: { from, to }, width, palette, recording, hovered }.

const NARROW = 1;
const ROOM_FOR_NAME = 10;
const FONT = "11px Inter, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
const SMALL = "10.5px Inter, system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
const ODD_MOMENTS = ["rewind", "cancelled", "late", "silent"];
const BAD_MOMENTS = ["failed", "leaked"];

/** The style sheet's colours, and the patterns that are made of them. */
class Palette {
  constructor() {
    this.style = getComputedStyle(document.documentElement);
    this.known = new Map();
    this.starved = this.hatch("starved", 1, 1);
    this.blocked = this.hatch("blocked", -1, 1.4);
  }

  color(name) {
    if (!this.known.has(name)) this.known.set(name, this.style.getPropertyValue(`--${name}`).trim());
    return this.known.get(name);
  }

  /** Slanted lines on a ground, to one side or the other. */
  hatch(name, slant, thickness) {
    const ratio = devicePixelRatio || 1;
    const tile = Math.round(7 * ratio);
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = tile;
    const ink = canvas.getContext("2d");
    ink.fillStyle = this.color(`${name}-ground`);
    ink.fillRect(0, 0, tile, tile);
    ink.strokeStyle = this.color(name);
    ink.lineWidth = thickness * ratio;
    ink.beginPath();
    for (const shift of [-tile, 0, tile]) {
      ink.moveTo(shift - 1, slant > 0 ? tile + 1 : -1);
      ink.lineTo(shift + tile + 1, slant > 0 ? -1 : tile + 1);
    }
    ink.stroke();
    const pattern = ink.createPattern(canvas, "repeat");
    pattern.setTransform(new DOMMatrix().scale(1 / ratio));
    return pattern;
  }

  /** What a span is painted with: units by stage and by whether their pass is even, waits by kind. */
  fill(stage, kind) {
    return [this.color(stage), this.color(`${stage}-next`), this.starved, this.blocked][kind];
  }
}

function kindOf(unit, pass) {
  if (unit === STARVED) return 2;
  if (unit === BLOCKED) return 3;
  return pass % 2;
}

/** A canvas of the given height and of its element's width, emptied; its units are the page's pixels. */
function surface(canvas, height) {
  const ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const ink = canvas.getContext("2d");
  ink.scale(ratio, ratio);
  return { ink, width };
}

const nameWidths = new Map();

/** As much of a unit's name as there is room for: all of it, or the number at its end. */
function nameFor(ink, name, room) {
  const width = (text) => {
    if (!nameWidths.has(text)) nameWidths.set(text, ink.measureText(text).width);
    return nameWidths.get(text);
  };
  if (width(name) <= room) return name;
  const number = name.match(/\d+$/)?.[0] ?? "";
  return width(number) <= room ? number : "";
}

/** Spans of one row. Those that are narrower than a pixel are summed up pixel by pixel. */
function paintRow(ink, row, stage, top, height, frame, named) {
  const { view, width, palette, hovered } = frame;
  const scale = width / (view.to - view.from);
  const narrow = new Float32Array(4 * (Math.ceil(width) + 1));
  let anyNarrow = false;
  const outlined = [];
  const radius = height >= 14 ? 2.5 : 0;
  ink.font = FONT;
  ink.textBaseline = "middle";
  for (let i = row.firstAfter(view.from - 1); i < row.count && row.starts[i] <= view.to; i++) {
    const left = Math.max((row.starts[i] - view.from) * scale, -4);
    const right = Math.min((row.ends[i] - view.from) * scale, width + 4);
    const unit = row.units[i];
    const kind = kindOf(unit, row.passes[i]);
    if (hovered && unit >= 0 && unit === hovered.unit && row.passes[i] === hovered.pass) outlined.push([left, right]);
    if (right - left < NARROW) {
      // What reaches into the next pixel is counted there.
      const pixel = Math.max(0, Math.floor(left));
      const here = Math.min(right, pixel + 1) - left;
      narrow[4 * pixel + kind] += Math.max(here, 1e-6);
      if (right > pixel + 1 && pixel < width) narrow[4 * (pixel + 1) + kind] += right - pixel - 1;
      anyNarrow = true;
      continue;
    }
    ink.fillStyle = palette.fill(stage, kind);
    const gap = right - left > 4 ? 1 : 0;
    if (kind > 1 || radius === 0 || right - left < 6) {
      const inset = kind > 1 && height >= 14 ? 3 : 0;
      ink.fillRect(left, top + inset, right - left - gap, height - 2 * inset);
    } else {
      ink.beginPath();
      ink.roundRect(left, top, right - left - gap, height, radius);
      ink.fill();
    }
    if (named && kind < 2 && height >= 12 && right - left > 16) {
      const visible = Math.max(left, 0);
      const room = Math.min(right, width) - visible - ROOM_FOR_NAME;
      const name = room > 6 ? nameFor(ink, unitName(frame.recording, { unit }), room) : "";
      ink.fillStyle = palette.color(kind ? "on-next" : "on");
      if (name) ink.fillText(name, visible + ROOM_FOR_NAME / 2, top + height / 2 + 0.5);
    }
  }
  if (anyNarrow) paintNarrow(ink, narrow, stage, top, height, palette);
  ink.strokeStyle = palette.color("ink");
  ink.lineWidth = 1.5;
  for (const [left, right] of outlined) ink.strokeRect(left - 0.5, top - 0.5, Math.max(right - left, 2), height + 1);
}

/** Each pixel in a mix of the kinds' colours, by the share of it that each fills; work is seen however short it was. */
function paintNarrow(ink, narrow, stage, top, height, palette) {
  for (let pixel = 0; 4 * pixel < narrow.length; pixel++) {
    const shares = narrow.subarray(4 * pixel, 4 * pixel + 4);
    for (const kind of [0, 1]) if (shares[kind] > 0) shares[kind] = Math.max(shares[kind], 0.12);
    const total = shares[0] + shares[1] + shares[2] + shares[3];
    if (total === 0) continue;
    // Laid over each other, each covers what is below by its share of all that is there by then.
    let below = Math.max(0, 1 - total);
    for (let kind = 3; kind >= 0; kind--) {
      if (shares[kind] === 0) continue;
      below += shares[kind];
      ink.globalAlpha = shares[kind] / below;
      ink.fillStyle = palette.fill(stage, kind);
      ink.fillRect(pixel, top, 1, height);
    }
  }
  ink.globalAlpha = 1;
}

/** How high the rows of a lane are, and the lane. */
function laneLayout(lane) {
  const rows = Math.max(lane.rows.length, 1);
  const row = rows === 1 ? 24 : Math.max(7, Math.min(20, Math.floor(110 / rows)));
  const gap = row > 10 ? 3 : 1;
  const margin = 8;
  return { row, gap, margin, height: Math.max(2 * margin + rows * row + (rows - 1) * gap, 46) };
}

function paintLane(ink, lane, frame) {
  const { row, gap, margin, height } = laneLayout(lane);
  paintGrid(ink, height, frame);
  const rows = Math.max(lane.rows.length, 1);
  const top = Math.max(margin, (height - rows * row - (rows - 1) * gap) / 2);
  lane.rows.forEach((spans, i) => paintRow(ink, spans, lane.stage, top + i * (row + gap), row, frame, true));
}

/** Lines where the scale has its numbers, and where something happened. */
function paintGrid(ink, height, frame) {
  const { view, width, palette, recording } = frame;
  const scale = width / (view.to - view.from);
  ink.fillStyle = palette.color("grid");
  for (const time of ticks(view, width).times) ink.fillRect(Math.round((time - view.from) * scale), 0, 1, height);
  for (const { at, kind } of recording.moments) {
    if (at < view.from || at > view.to || kind === "pass ended") continue;
    const color = BAD_MOMENTS.includes(kind) ? "bad" : ODD_MOMENTS.includes(kind) ? "odd" : "faint";
    ink.fillStyle = palette.color(color);
    ink.globalAlpha = color === "faint" ? 0.45 : 0.8;
    ink.fillRect(Math.round((at - view.from) * scale), 0, 1, height);
    ink.globalAlpha = 1;
  }
}

/** Round times, at least 90 pixels apart. */
function ticks(view, width) {
  const least = ((view.to - view.from) / width) * 90;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((candidate) => candidate >= least * 0.999);
  const times = [];
  for (let n = Math.ceil(view.from / step); n * step <= view.to; n++) times.push(n * step);
  return { step, times };
}

const RULER = 46;

function paintRuler(ink, frame) {
  const { view, width, palette } = frame;
  const scale = width / (view.to - view.from);
  const { step, times } = ticks(view, width);
  ink.font = FONT;
  ink.textBaseline = "middle";
  for (const time of times) {
    const x = Math.round((time - view.from) * scale);
    ink.fillStyle = palette.color("line");
    ink.fillRect(x, RULER - 16, 1, 16);
    ink.fillStyle = palette.color("soft");
    const text = moment(time, step, view.to);
    if (x + ink.measureText(text).width + 6 < width) ink.fillText(text, x + 5, RULER - 10);
  }
  paintFlags(ink, frame, scale);
}

/** Flags for what happened; a flag's words are left out where the one before leaves no room, but bad news comes first. */
function paintFlags(ink, frame, scale) {
  const { view, width, palette, recording } = frame;
  const shown = recording.moments.filter(({ at }) => at >= view.from && at <= view.to);
  const rank = ({ kind }) => (BAD_MOMENTS.includes(kind) ? 0 : ODD_MOMENTS.includes(kind) ? 1 : 2);
  const taken = [];
  for (const moment of shown.slice().sort((a, b) => rank(a) - rank(b) || a.at - b.at)) {
    if (moment.kind === "pass ended") continue;
    const color = palette.color(["bad", "odd", "faint"][rank(moment)]);
    const x = Math.round((moment.at - view.from) * scale);
    ink.fillStyle = color;
    ink.fillRect(x, 6, 1, RULER - 6);
    ink.font = SMALL;
    const text = moment.kind === "pass begun" ? moment.text || "pass" : moment.kind;
    const length = ink.measureText(text).width + 10;
    const left = x + length > width ? x - length : x;
    if (taken.some(([from, to]) => left < to + 3 && left + length > from - 3)) continue;
    taken.push([left, left + length]);
    if (rank(moment) < 2) {
      ink.fillRect(left, 6, length, 15);
      ink.fillStyle = palette.color("panel");
    } else {
      ink.fillStyle = palette.color("soft");
    }
    ink.fillText(text, left + 5, 14);
  }
}

const RATE_HEIGHT = 70;
const BIN = 2;

function paintRate(ink, link, frame) {
  const { view, width, palette } = frame;
  paintGrid(ink, RATE_HEIGHT, frame);
  const bins = Math.max(1, Math.ceil(width / BIN));
  const each = (view.to - view.from) * (BIN / width);
  const rates = new Float64Array(bins);
  let before = link.moved.until(view.from);
  for (let bin = 0; bin < bins; bin++) {
    const until = link.moved.until(view.from + (bin + 1) * each);
    rates[bin] = Math.max(0, until - before) / each;
    before = until;
  }
  const most = Math.max(link.limit ?? 0, ...rates, 1e-9) * 1.22;
  const y = (value) => RATE_HEIGHT - 1 - (value / most) * (RATE_HEIGHT - 8);
  area(ink, rates, (bin) => bin * BIN, y, RATE_HEIGHT, palette.color(link.stage), width);
  if (link.limit !== null) {
    limitLine(ink, y(link.limit), `limit ${rate(link.limit)}`, width, palette);
  }
}

/** Steps as a line above a tinted ground; `x` of one step more than there are is where the last ends. */
function area(ink, values, x, y, height, color, width) {
  ink.beginPath();
  values.forEach((value, i) => {
    ink.lineTo(Math.min(x(i), width), y(value));
    ink.lineTo(Math.min(x(i + 1), width), y(value));
  });
  ink.strokeStyle = color;
  ink.lineWidth = 1.25;
  ink.stroke();
  ink.lineTo(width, height);
  ink.lineTo(Math.max(x(0), 0), height);
  ink.closePath();
  ink.globalAlpha = 0.2;
  ink.fillStyle = color;
  ink.fill();
  ink.globalAlpha = 1;
}

function limitLine(ink, y, text, width, palette) {
  ink.strokeStyle = palette.color("ink");
  ink.lineWidth = 1;
  ink.setLineDash([5, 4]);
  ink.beginPath();
  ink.moveTo(0, Math.round(y) - 0.5);
  ink.lineTo(width, Math.round(y) - 0.5);
  ink.globalAlpha = 0.6;
  ink.stroke();
  ink.globalAlpha = 1;
  ink.setLineDash([]);
  ink.font = SMALL;
  ink.textBaseline = "alphabetic";
  const length = ink.measureText(text).width;
  ink.fillStyle = palette.color("panel");
  ink.globalAlpha = 0.85;
  ink.fillRect(width - length - 11, y - 14, length + 6, 12);
  ink.globalAlpha = 1;
  ink.fillStyle = palette.color("soft");
  ink.fillText(text, width - length - 8, y - 4);
}

const SLOTS_HEIGHT = 52;

function paintSlots(ink, ring, frame) {
  const { view, width, palette } = frame;
  paintGrid(ink, SLOTS_HEIGHT, frame);
  const scale = width / (view.to - view.from);
  const y = (value) => SLOTS_HEIGHT - 1 - (value / ring.slots) * (SLOTS_HEIGHT - 18);
  const first = Math.max(0, firstAbove(ring.times, view.from) - 1);
  const last = firstAbove(ring.times, view.to);
  const color = palette.color("slots");
  if (last - first < width) {
    const at = (i) => Math.max(0, ((ring.times[first + i] ?? frame.recording.end) - view.from) * scale);
    area(ink, ring.counts.slice(first, last), at, y, SLOTS_HEIGHT, color, width);
  } else {
    // More steps than pixels: their mean.
    const each = (view.to - view.from) * (BIN / width);
    const mean = (bin) => ring.mean(view.from + bin * each, view.from + (bin + 1) * each);
    area(ink, Float64Array.from({ length: Math.ceil(width / BIN) }, (_, bin) => mean(bin)), (bin) => bin * BIN, y, SLOTS_HEIGHT, color, width);
  }
  limitLine(ink, y(ring.slots), ring.slots === 1 ? "1 slot" : `${ring.slots} slots`, width, palette);
}

const STRIPE = 5;

/** The whole run with the window that is in view. */
function paintOverview(ink, height, frame, window) {
  const { width, palette, recording } = frame;
  const scale = width / recording.end;
  recording.lanes.forEach((lane, i) => {
    for (const row of lane.rows) paintRow(ink, row, lane.stage, 8 + i * (STRIPE + 2), STRIPE, frame, false);
  });
  const [left, right] = [window.from * scale, Math.max(window.to * scale, window.from * scale + 2)];
  if (window.from <= 0 && window.to >= recording.end) return;
  ink.fillStyle = palette.color("panel");
  ink.globalAlpha = 0.68;
  ink.fillRect(0, 0, left, height);
  ink.fillRect(right, 0, width - right, height);
  ink.globalAlpha = 1;
  ink.strokeStyle = palette.color("accent");
  ink.lineWidth = 1.5;
  ink.strokeRect(left, 1.5, right - left, height - 3);
  ink.fillStyle = palette.color("accent");
  for (const x of [left, right]) {
    ink.beginPath();
    ink.roundRect(x - 2.5, height / 2 - 8, 5, 16, 2.5);
    ink.fill();
  }
}

/** A stage's time as one bar. */
function paintShares(canvas, lane, part, palette) {
  const { ink, width } = surface(canvas, 10);
  ink.fillStyle = palette.color("grid");
  ink.fillRect(0, 0, width, 10);
  let left = 0;
  for (const [share, kind] of [[part.busy, 0], [part.starved, 2], [part.blocked, 3]]) {
    ink.fillStyle = palette.fill(lane.stage, kind);
    ink.fillRect(left, 0, share * width, 10);
    left += share * width;
  }
}
