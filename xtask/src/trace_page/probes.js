// What cargo xtask trace-page asks of a page, beside the page's own script.
const probes = {
  // The range in view, in seconds.
  range() {
    const { from, to } = document.getElementById('range').dataset;
    return [Number(from), Number(to)];
  },

  rangeText() {
    return document.getElementById('range').textContent;
  },

  texts(selector) {
    return [...document.querySelectorAll(selector)].map((node) => node.textContent);
  },

  // Left, top, width, height.
  box(selector) {
    const box = document.querySelector(selector).getBoundingClientRect();
    return [box.left, box.top, box.width, box.height];
  },

  lost() {
    const node = document.getElementById('lost');
    return node.hidden ? '' : node.textContent;
  },

  // For each lane, whether it looks another way without its spans.
  painted() {
    const canvases = tracks.filter((track) => track.kind === 'lane').map((track) => track.canvas);
    const pictures = () => { paint(); return canvases.map((canvas) => canvas.toDataURL()); };
    const full = pictures();
    const rows = recording.lanes.map((lane) => lane.rows.splice(0));
    const empty = pictures();
    recording.lanes.forEach((lane, i) => lane.rows.push(...rows[i]));
    return full.map((picture, i) => picture !== empty[i]);
  },

  paintMilliseconds() {
    const begun = performance.now();
    paint();
    return performance.now() - begun;
  },

  // Shows the longest unit of the first lane: begin and end in seconds, its name.
  showLongestUnit() {
    const [lane] = recording.lanes;
    const [row] = lane.rows;
    const units = [...row.units.keys()].filter((i) => row.units[i] >= 0);
    const i = units.reduce((best, i) => (row.ends[i] - row.starts[i] > row.ends[best] - row.starts[best] ? i : best));
    setView(row.starts[i], row.ends[i]);
    return [row.starts[i] / 1e9, row.ends[i] / 1e9, unitName(recording, { unit: row.units[i] })];
  },

  // Which rule of the page's policy refuses a connection.
  refusedConnection() {
    return new Promise((resolve) => {
      document.addEventListener('securitypolicyviolation', (event) => resolve(event.effectiveDirective));
      fetch('http://127.0.0.1:9/').catch(() => {});
      setTimeout(() => resolve('nothing'), 10000);
    });
  },
};
