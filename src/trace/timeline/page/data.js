"use strict";
// What the page carries, made ready for questions about any window of time. Times are nanoseconds, rates bytes a nanosecond,
// which are GB/s.

const STARVED = -1;
const BLOCKED = -2;

/** The first index of a sorted array whose value is greater than `value`. */
function firstAbove(sorted, value) {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] > value) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** An amount that grows evenly within each of some spans that do not overlap: how much of it falls into a window. */
class Growth {
  constructor(starts, ends, amounts) {
    this.starts = starts;
    this.ends = ends;
    this.before = new Float64Array(starts.length + 1);
    for (let i = 0; i < starts.length; i++) this.before[i + 1] = this.before[i] + amounts[i];
  }

  until(time) {
    const index = firstAbove(this.starts, time) - 1;
    if (index < 0) return 0;
    const start = this.starts[index];
    const amount = this.before[index + 1] - this.before[index];
    const share = time >= this.ends[index] ? 1 : (time - start) / (this.ends[index] - start);
    return this.before[index] + amount * share;
  }

  within(from, to) {
    return this.until(to) - this.until(from);
  }
}

/** Several growths as one. */
class Sum {
  constructor(parts) {
    this.parts = parts;
  }

  until(time) {
    return this.parts.reduce((sum, part) => sum + part.until(time), 0);
  }

  within(from, to) {
    return this.until(to) - this.until(from);
  }
}

/** Spans that do not overlap, in the order of time. */
class Row {
  constructor(columns) {
    const count = columns.start.length;
    this.count = count;
    this.starts = new Float64Array(count);
    this.ends = new Float64Array(count);
    this.units = Int32Array.from(columns.unit);
    this.passes = Float64Array.from(columns.pass);
    this.bytes = Float64Array.from(columns.bytes);
    let start = 0;
    for (let i = 0; i < count; i++) {
      start += columns.start[i];
      this.starts[i] = start;
      this.ends[i] = start + columns.length[i];
    }
  }

  /** The first span that ends after a time. */
  firstAfter(time) {
    return firstAbove(this.ends, time);
  }

  /** The time of the spans that `wanted` says, as a growth. */
  time(wanted) {
    const chosen = [];
    for (let i = 0; i < this.count; i++) if (wanted(this.units[i])) chosen.push(i);
    const starts = Float64Array.from(chosen, (i) => this.starts[i]);
    const ends = Float64Array.from(chosen, (i) => this.ends[i]);
    return new Growth(starts, ends, ends.map((end, i) => end - starts[i]));
  }

  moved() {
    return new Growth(this.starts, this.ends, this.bytes);
  }

  span(lane, i) {
    return {
      lane,
      start: this.starts[i],
      end: this.ends[i],
      unit: this.units[i],
      pass: this.passes[i],
      bytes: this.bytes[i],
    };
  }
}

/** A thread's spans, or a device stream's. */
class Lane {
  constructor(data) {
    this.stage = data.stage;
    this.device = data.device;
    this.before = data.before;
    this.enqueues = false;
    this.rows = data.rows.map((columns) => new Row(columns));
    this.moved = new Sum(this.rows.map((row) => row.moved()));
    this.starved = new Sum(this.rows.map((row) => row.time((unit) => unit === STARVED)));
    this.blocked = new Sum(this.rows.map((row) => row.time((unit) => unit === BLOCKED)));
    this.busy = this.timeAtWork();
    const ends = this.rows.flatMap((row) => Array.from(row.ends.filter((_, i) => row.units[i] >= 0)));
    this.unitEnds = Float64Array.from(ends).sort();
  }

  /** The time in which at least one unit is on its way: units in two rows at once count once. */
  timeAtWork() {
    const units = (unit) => unit >= 0;
    if (this.rows.length < 2) return new Sum(this.rows.map((row) => row.time(units)));
    const all = this.rows.map((row) => row.time(units));
    const sorted = (field) => Float64Array.from(all.flatMap((time) => Array.from(time[field]))).sort();
    const [begun, ended] = [sorted("starts"), sorted("ends")];
    const [starts, ends] = [[], []];
    let open = 0;
    for (let i = 0, j = 0; j < ended.length; ) {
      if (i < begun.length && begun[i] <= ended[j]) {
        if (open++ === 0) starts.push(begun[i]);
        i++;
      } else {
        if (--open === 0) ends.push(ended[j]);
        j++;
      }
    }
    return new Growth(Float64Array.from(starts), Float64Array.from(ends), ends.map((end, i) => end - starts[i]));
  }

  unitsWithin(from, to) {
    return firstAbove(this.unitEnds, to) - firstAbove(this.unitEnds, from);
  }

  /** The span of a row at a time, or the nearest within `reach`. */
  spanAt(row, time, reach) {
    const spans = this.rows[row];
    if (!spans || spans.count === 0) return null;
    const after = Math.min(spans.firstAfter(time), spans.count - 1);
    const distance = (i) => Math.max(spans.starts[i] - time, time - spans.ends[i], 0);
    const nearest = after > 0 && distance(after - 1) < distance(after) ? after - 1 : after;
    return distance(nearest) <= reach ? spans.span(this, nearest) : null;
  }
}

/** A ring of slots: how many are in use, from when on. */
class Ring {
  constructor(data, end) {
    Object.assign(this, { name: data.name, slots: data.slots, stage: data.filled_by });
    this.times = Float64Array.from(data.steps, (step) => step[0]);
    this.counts = Float64Array.from(data.steps, (step) => step[1]);
    const ends = this.times.map((_, i) => (i + 1 < this.times.length ? this.times[i + 1] : end));
    this.used = new Growth(this.times, ends, ends.map((until, i) => (until - this.times[i]) * this.counts[i]));
  }

  at(time) {
    return this.counts[firstAbove(this.times, time) - 1] ?? 0;
  }

  mean(from, to) {
    return this.used.within(from, to) / (to - from);
  }
}

/** A link, and the lane whose spans move bytes over it. */
class Link {
  constructor(data, lanes) {
    Object.assign(this, { name: data.name, stage: data.stage, limit: data.limit === null ? null : data.limit / 1e9 });
    this.moved = data.lane === null ? new Sum([]) : lanes[data.lane].moved;
  }

  mean(from, to) {
    return this.moved.within(from, to) / (to - from);
  }
}

function readRecording(text) {
  const data = JSON.parse(text);
  const end = Math.max(data.end, 1);
  const lanes = data.lanes.map((lane) => new Lane(lane));
  // A thread whose device has a lane of its own hands work over and does not wait for it.
  for (const lane of lanes) lane.enqueues = !lane.device && lanes.some((other) => other.device && other.stage === lane.stage);
  return {
    ...data,
    end,
    lanes,
    rings: data.rings.map((ring) => new Ring(ring, end)),
    links: data.links.map((link) => new Link(link, lanes)),
  };
}
