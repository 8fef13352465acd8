// Builds the page, and turns what a person does into the window of time that is in view.

const recording = readRecording(document.getElementById("recording").textContent);
const LEAST_WINDOW = Math.min(1000, recording.end);
const view = { from: 0, to: recording.end };
const tracks = [];
let palette = new Palette();
let hovered = null;
let scheduled = false;

const byId = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") made.style.cssText = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// What does not change.

function writeHead() {
  const model = recording.facts.find(([name]) => name === "model")?.[1];
  byId("title").textContent = model ?? "Timeline of a run";
  document.title = model ? `${model}: timeline` : "Timeline";
  for (const [name, value] of recording.facts) {
    if (name === "model") continue;
    byId("facts").append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  }
  byId("verdict").append(...recording.verdict.map((line) => element("p", {}, line)));
  const lost = [];
  const many = (count) => count.toLocaleString("en");
  if (recording.dropped) lost.push(`The ${many(recording.dropped)} oldest events are missing: newer ones took their place in the buffer.`);
  if (recording.untimed) lost.push(`${many(recording.untimed)} copies and layers are missing on the device's lanes: too many were under way to be timed.`);
  byId("lost").textContent = lost.join(" ");
  byId("lost").hidden = lost.length === 0;
}

function writeLegend() {
  const stages = [...new Set(recording.lanes.map((lane) => lane.stage))];
  const items = [[stages[0] ?? "read", 0, "at work"], [stages[0] ?? "read", 1, "next pass"], ["", 2, "starved: waits for the stage before"], ["", 3, "blocked: waits for a slot"]];
  byId("legend").replaceChildren(...items.map(([, , text]) => element("li", {}, element("canvas"), text)));
  const paint = () =>
    byId("legend").querySelectorAll("canvas").forEach((canvas, i) => {
      const { ink, width } = surface(canvas, 10);
      ink.fillStyle = palette.fill(items[i][0], items[i][1]);
      ink.fillRect(0, 0, width, 10);
    });
  paint();
  return paint;
}

function writeHappened() {
  const odd = recording.moments.filter(({ kind }) => ODD_MOMENTS.includes(kind) || BAD_MOMENTS.includes(kind));
  const shown = odd.slice(0, 100);
  byId("happened").hidden = odd.length === 0;
  for (const { at, kind, text } of shown) {
    const show = element("button", { type: "button", title: "Show it" }, moment(at, 1e6));
    show.addEventListener("click", () => {
      const half = Math.min((view.to - view.from) / 2, recording.end / 20);
      setView(at - half, at + half);
      byId("tracks").scrollIntoView({ block: "nearest" });
    });
    const item = element("li", { class: BAD_MOMENTS.includes(kind) ? "bad" : "odd" }, show, element("b", {}, kind), element("p", {}, text));
    byId("happened").querySelector("ol").append(item);
  }
  if (odd.length > shown.length) byId("happened").append(element("p", { class: "note" }, `And ${odd.length - shown.length} more.`));
}

/** A row of the picture: words on the left, a canvas on the right. */
function addTrack(kind, title, mark, height, paint, extra = {}) {
  const small = element("small");
  const heading = element("b", mark ? { style: `--mark: var(--${mark})` } : { class: "plain" }, title);
  const canvas = element("canvas", { "aria-hidden": "true" });
  const box = element("div", { class: `track ${extra.section ? "section" : ""}`, "data-track": kind, "data-name": title }, element("div", {}, heading, small), canvas);
  if (mark && kind === "lane") box.dataset.stage = mark;
  byId("tracks").append(box);
  const track = { kind, box, small, canvas, height, paint, ...extra };
  tracks.push(track);
  return track;
}

function addTracks() {
  const { lanes, links, rings } = recording;
  const overview = 16 + Math.max(lanes.length, 1) * (STRIPE + 2) - 2;
  addTrack("overview", "Whole run", null, Math.max(overview, 40), (ink, frame) => paintOverview(ink, Math.max(overview, 40), { ...frame, view: { from: 0, to: recording.end }, hovered: null }, view), {
    words: () => duration(recording.end),
  });
  addTrack("ruler", "", null, RULER, paintRuler, { words: () => "" });
  for (const lane of lanes) {
    const layout = laneLayout(lane);
    addTrack("lane", lane.stage, lane.stage, layout.height, (ink, frame) => paintLane(ink, lane, frame), {
      lane,
      words: () => [whose(lane), `${percent(shares(lane, view.from, view.to).busy)} busy`],
    });
  }
  links.forEach((link, i) =>
    addTrack("link", link.name, link.stage, RATE_HEIGHT, (ink, frame) => paintRate(ink, link, frame), {
      section: i === 0,
      link,
      words: () => {
        const mean = link.mean(view.from, view.to);
        return [rate(mean), link.limit ? `${percent(mean / link.limit)} of limit` : "limit not measured"];
      },
    }),
  );
  rings.forEach((ring, i) =>
    addTrack("ring", ring.name, null, SLOTS_HEIGHT, (ink, frame) => paintSlots(ink, ring, frame), {
      section: i === 0,
      ring,
      words: () => [`${ring.mean(view.from, view.to).toFixed(1)} of ${ring.slots}`, "in use, mean"],
    }),
  );
  byId("tracks").append(element("div", { id: "cursor", hidden: "" }), element("div", { id: "selection", hidden: "" }));
}

function addStages() {
  const body = byId("stages").querySelector("tbody");
  return recording.lanes.map((lane) => {
    const canvas = element("canvas", { "aria-hidden": "true" });
    const cells = Array.from({ length: 4 }, (_, i) => element("td", i ? { class: "number" } : {}));
    const where = element("span", {}, ` ${whose(lane)}`);
    const name = element("td", { style: `--mark: var(--${lane.stage})` }, lane.stage, where);
    body.append(element("tr", { "data-stage": lane.stage }, name, element("td", {}, canvas), ...cells));
    return { lane, canvas, cells };
  });
}

// What changes with the window.

function setView(from, to) {
  const length = Math.min(Math.max(to - from, LEAST_WINDOW), recording.end);
  // Too short a window grows around its middle; one beyond an end is pushed back.
  const begin = (from + to - length) / 2;
  view.from = Math.min(Math.max(begin, 0), recording.end - length);
  view.to = view.from + length;
  schedule();
}

function schedule() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    paint();
    keepInAddress();
  });
}

function paint() {
  for (const track of tracks) {
    const { ink, width } = surface(track.canvas, track.height);
    if (width > 0) track.paint(ink, { view, width, palette, recording, hovered });
    const words = [track.words()].flat();
    track.small.replaceChildren(element("em", {}, words[0]), words[1] ? ` · ${words[1]}` : "");
    track.small.title = words.join(" · ");
  }
  const step = (view.to - view.from) / 100;
  const [from, to] = [moment(view.from, step, view.to), moment(view.to, step)];
  const whole = view.from <= 0 && view.to >= recording.end;
  const length = duration(view.to - view.from);
  byId("range").replaceChildren(element("strong", {}, `${from} – ${to}`), whole ? " · the whole run" : ` · ${length} of ${duration(recording.end)}`);
  Object.assign(byId("range").dataset, { from: seconds(view.from), to: seconds(view.to) });
  byId("stages-range").textContent = whole ? "in the whole run" : `from ${from} to ${to}`;
  for (const { lane, canvas, cells } of stages) {
    const part = shares(lane, view.from, view.to);
    const moved = lane.moved.within(view.from, view.to);
    paintShares(canvas, lane, part, palette);
    const busy = part.busy * (view.to - view.from);
    const texts = [inWords(recording, lane, part), lane.unitsWithin(view.from, view.to), lane.enqueues ? "" : size(moved), busy > 0 && moved > 0 && !lane.enqueues ? rate(moved / busy) : ""];
    cells.forEach((cell, i) => (cell.textContent = texts[i]));
  }
}

function fromAddress() {
  const found = location.hash.match(/^#t=(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?)$/);
  if (!found || Number(found[2]) <= Number(found[1])) return { from: 0, to: recording.end };
  return { from: Number(found[1]) * 1e9, to: Number(found[2]) * 1e9 };
}

let addressTimer = 0;

function keepInAddress() {
  clearTimeout(addressTimer);
  addressTimer = setTimeout(() => {
    const whole = view.from <= 0 && view.to >= recording.end;
    const hash = whole ? "" : `#t=${seconds(view.from)}-${seconds(view.to)}`;
    if (hash === location.hash) return;
    try {
      history.replaceState(null, "", hash || location.pathname + location.search);
    } catch {
      // Some viewers show the page under an address that must not change.
    }
  }, 150);
}

// What a person does.

const plot = () => tracks[0].canvas.getBoundingClientRect();
const share = (event) => (event.clientX - plot().left) / plot().width;
const timeAt = (event) => view.from + share(event) * (view.to - view.from);

function zoom(factor, time = (view.from + view.to) / 2) {
  const length = Math.min(Math.max((view.to - view.from) * factor, LEAST_WINDOW), recording.end);
  const begin = time - ((time - view.from) / (view.to - view.from)) * length;
  setView(begin, begin + length);
}

function move(by) {
  const length = view.to - view.from;
  const begin = Math.min(Math.max(view.from + by * length, 0), recording.end - length);
  setView(begin, begin + length);
}

const KEYS = {
  "+": () => zoom(0.6),
  "=": () => zoom(0.6),
  "-": () => zoom(1 / 0.6),
  ArrowLeft: () => move(-0.2),
  ArrowRight: () => move(0.2),
  Tier: () => setView(0, view.to - view.from),
  End: () => setView(recording.end - (view.to - view.from), recording.end),
  0: () => setView(0, recording.end),
};

function onWheel(event) {
  if (event.target.tagName !== "CANVAS") return;
  const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey;
  const by = (event.deltaY || event.deltaX) * (event.deltaMode ? 16 : 1);
  const whole = view.to - view.from >= recording.end;
  // A whole run cannot grow: the page scrolls.
  if (whole && (sideways || by > 0)) return;
  event.preventDefault();
  if (sideways) move((event.deltaX || event.deltaY) / plot().width);
  else zoom(Math.exp(by * (event.ctrlKey ? 0.012 : 0.0022)), tracks[0].canvas === event.target ? undefined : timeAt(event));
}

/** Fingers and buttons that are down, by their number. */
const pointers = new Map();
let drag = null;

function onDown(event) {
  const track = tracks.find((track) => track.canvas === event.target);
  if (!track || event.button > 0) return;
  event.target.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, event);
  if (pointers.size === 2) {
    const [one, other] = [...pointers.values()];
    drag = { kind: "pinch", apart: Math.abs(one.clientX - other.clientX), from: view.from, to: view.to, middle: (share(one) + share(other)) / 2 };
    return;
  }
  const at = track.kind === "overview" ? share(event) * recording.end : timeAt(event);
  const inWindow = at >= view.from && at <= view.to && view.to - view.from < recording.end;
  const edge = (12 / plot().width) * recording.end;
  if (track.kind === "overview" && inWindow) {
    const kind = at - view.from < edge ? "from" : view.to - at < edge ? "to" : "window";
    drag = { kind, at, from: view.from, to: view.to };
  } else if (track.kind === "overview" || track.kind === "ruler" || event.shiftKey) {
    drag = { kind: "select", whole: track.kind === "overview", at: share(event), x: event.clientX };
  } else {
    drag = { kind: "pan", x: event.clientX, from: view.from, to: view.to };
    event.target.classList.add("grabbed");
  }
}

function onMove(event) {
  if (pointers.has(event.pointerId)) pointers.set(event.pointerId, event);
  if (!drag) return point(event);
  const { width } = plot();
  const limited = Math.min(Math.max(share(event), 0), 1);
  if (drag.kind === "pinch" && pointers.size === 2) {
    const [one, other] = [...pointers.values()];
    const length = (drag.to - drag.from) * Math.min(drag.apart / Math.max(Math.abs(one.clientX - other.clientX), 1), 50);
    const time = drag.from + drag.middle * (drag.to - drag.from);
    const middle = (share(one) + share(other)) / 2;
    setView(time - middle * length, time + (1 - middle) * length);
  } else if (drag.kind === "pan") {
    const by = Math.min(Math.max(((drag.x - event.clientX) / width) * (drag.to - drag.from), -drag.from), recording.end - drag.to);
    setView(drag.from + by, drag.to + by);
  } else if (drag.kind === "window") {
    const by = Math.min(Math.max(limited * recording.end - drag.at, -drag.from), recording.end - drag.to);
    setView(drag.from + by, drag.to + by);
  } else if (drag.kind === "from") {
    setView(Math.min(limited * recording.end, view.to - LEAST_WINDOW), view.to);
  } else if (drag.kind === "to") {
    setView(view.from, Math.max(limited * recording.end, view.from + LEAST_WINDOW));
  } else if (drag.kind === "select") {
    drag.until = limited;
    const left = plot().left - byId("tracks").getBoundingClientRect().left - 1;
    const [from, to] = [Math.min(drag.at, limited), Math.max(drag.at, limited)];
    byId("selection").style.cssText = `left: ${left + from * width}px; width: ${(to - from) * width}px`;
    byId("selection").hidden = false;
  }
  showTip(null);
}

function onUp(event) {
  pointers.delete(event.pointerId);
  if (drag?.kind === "select" && drag.until !== undefined && Math.abs(event.clientX - drag.x) > 3) {
    const base = drag.whole ? { from: 0, to: recording.end } : { ...view };
    const at = (share) => base.from + share * (base.to - base.from);
    setView(at(Math.min(drag.at, drag.until)), at(Math.max(drag.at, drag.until)));
  }
  byId("selection").hidden = true;
  event.target.classList?.remove("grabbed");
  drag = null;
}

/** Tells what is under the pointer. */
function point(event) {
  const track = tracks.find((track) => track.canvas === event.target);
  const time = timeAt(event);
  let span = null;
  let told = null;
  const near = 3 * ((view.to - view.from) / plot().width);
  if (track?.lane) {
    const { row, gap, height } = laneLayout(track.lane);
    const rows = track.lane.rows.length;
    const top = (height - rows * row - (rows - 1) * gap) / 2;
    const y = event.clientY - track.canvas.getBoundingClientRect().top - top;
    span = track.lane.spanAt(Math.floor((y + gap / 2) / (row + gap)), time, near);
    if (span) told = spanInWords(recording, span);
  } else if (track?.link) {
    const pace = track.link.mean(time - near, time + near);
    told = [track.link.name, [["moves", rate(pace)], ["limit", track.link.limit ? rate(track.link.limit) : "not measured"], ["at", moment(time, 1e3)]]];
  } else if (track?.ring) {
    told = [track.ring.name, [["in use", `${track.ring.at(time)} of ${track.ring.slots}`], ["at", moment(time, 1e3)]]];
  } else if (track?.kind === "ruler") {
    const close = recording.moments.filter(({ at }) => Math.abs(at - time) <= 2 * near);
    if (close.length) told = [close.map(({ kind }) => kind).join(", "), close.flatMap(({ at, text }) => [["at", moment(at, 1e3)], ...(text ? [["", text]] : [])])];
  }
  const unit = span && span.unit >= 0 ? span : null;
  if (unit?.unit !== hovered?.unit || unit?.pass !== hovered?.pass) {
    hovered = unit;
    schedule();
  }
  byId("cursor").hidden = !track || track.kind === "overview";
  byId("cursor").style.left = `${event.clientX - byId("tracks").getBoundingClientRect().left - 1}px`;
  showTip(told, event);
}

function showTip(told, event) {
  const tip = byId("tip");
  tip.hidden = !told;
  if (!told) return;
  const [headline, lines] = told;
  const list = element("dl", {}, ...lines.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  tip.replaceChildren(element("b", {}, headline), list);
  const [width, height] = [tip.offsetWidth, tip.offsetHeight];
  const left = event.clientX + 16 + width > innerWidth ? event.clientX - width - 12 : event.clientX + 16;
  const top = Math.min(event.clientY + 16, innerHeight - height - 8);
  tip.style.cssText = `left: ${Math.max(left, 4)}px; top: ${Math.max(top, 4)}px`;
}

function onLeave() {
  byId("cursor").hidden = true;
  showTip(null);
  if (hovered) {
    hovered = null;
    schedule();
  }
}

function listen() {
  const box = byId("tracks");
  box.addEventListener("wheel", onWheel, { passive: false });
  box.addEventListener("pointerdown", onDown);
  box.addEventListener("pointermove", onMove);
  box.addEventListener("pointerup", onUp);
  box.addEventListener("pointercancel", onUp);
  box.addEventListener("pointerleave", onLeave);
  box.addEventListener("dblclick", () => KEYS[0]());
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, event.key)) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  byId("zoom").addEventListener("click", (event) => KEYS[event.target.dataset.key]?.());
  addEventListener("hashchange", () => {
    const { from, to } = fromAddress();
    setView(from, to);
  });
  const repaint = (print) => {
    document.documentElement.classList.toggle("print", print);
    palette = new Palette();
    paintLegend();
    paint();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => repaint(false));
  addEventListener("beforeprint", () => repaint(true));
  addEventListener("afterprint", () => repaint(false));
  new ResizeObserver(schedule).observe(box);
}

writeHead();
const paintLegend = writeLegend();
writeHappened();
addTracks();
const stages = addStages();
listen();
const opened = fromAddress();
setView(opened.from, opened.to);
paint();
document.documentElement.dataset.ready = "";
