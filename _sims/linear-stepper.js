// <linear-stepper>: walk through causal linear attention of one small head, chunk by chunk.
// Chunks of 1 are the recurrence, one chunk of all tokens is the masked square: three forms, one control.
// The arithmetic is in pure functions (window.effattn.linearStepper); the browser test compares them with
// effattn_lab. The element only draws the frames that simulate() returns.
// needs: stepper
(function () {
  "use strict";

  const { Stepper, dot, maxDiff, fmt } = window.effattn.stepper;

  // One head, 8 tokens, 2 features (positive already) and 2 values. A {sim} body may replace any of these fields.
  const DEFAULTS = {
    q: [[1.2, 0.4], [0.6, 1.1], [0.9, 0.3], [1.5, 0.8], [0.2, 0.9], [0.3, 1.7], [1.8, 0.5], [0.7, 1.4]],
    k: [[0.5, 0.2], [1.1, 0.9], [0.3, 1.2], [1.6, 0.4], [0.3, 1.5], [1.2, 0.7], [1.9, 0.6], [0.8, 2.1]],
    v: [[1, 0], [0, 1], [2, 1], [-1, 2], [1, -1], [0, 2], [3, 0], [1, 1]],
    chunk: 2, normalize: true, eps: 1e-6,
  };

  const zeros = (...shape) => shape.length === 1 ? Array(shape[0]).fill(0) : Array.from({ length: shape[0] }, () => zeros(...shape.slice(1)));

  // All weights laid out, masked, summed. Returns the outputs [N][Dv].
  function quadratic({ q, k, v, normalize, eps }) {
    return q.map((row, i) => {
      const w = k.slice(0, i + 1).map((key) => dot(row, key)), total = normalize ? w.reduce((a, b) => a + b, 0) + eps : 1;
      return v[0].map((_, c) => w.reduce((sum, x, j) => sum + x * v[j][c], 0) / total);
    });
  }

  // Frames of the chunked computation. For each chunk: read the state, lay out the small square, write the state.
  // pairs: multiply-adds inside squares; state: multiply-adds with the state (write and read). The denominator counts
  // as one more value, and the masked half of a square is computed too.
  function simulate(options) {
    const o = Object.assign({}, DEFAULTS, options), { q, k, v, chunk } = o;
    const n = q.length, F = q[0].length, D = v[0].length, frames = [], out = [];
    let S = zeros(F, D), z = zeros(F), pairs = 0, state = 0;
    const push = (frame) => frames.push(Object.assign({ S, z, pairs, state, out: out.slice() }, frame));
    for (let a = 0; a < n; a += chunk) {
      const b = Math.min(a + chunk, n), c = b - a, rows = [a, b];
      const num = zeros(c, D), den = zeros(c);
      for (let r = 0; r < c; r++) {
        for (let e = 0; e < D; e++) for (let f = 0; f < F; f++) num[r][e] += q[a + r][f] * S[f][e];
        den[r] = dot(q[a + r], z);
      }
      state += c * F * (D + 1);
      push({ kind: "read", rows, num: num.map((x) => x.slice()), den: den.slice() });
      const square = zeros(c, c);
      for (let r = 0; r < c; r++) for (let j = 0; j <= r; j++) {
        square[r][j] = dot(q[a + r], k[a + j]);
        for (let e = 0; e < D; e++) num[r][e] += square[r][j] * v[a + j][e];
        den[r] += square[r][j];
      }
      pairs += c * c * (F + D + 1);
      num.forEach((row, r) => out.push(row.map((x) => o.normalize ? x / (den[r] + o.eps) : x)));
      push({ kind: "inside", rows, square, num: num.map((x) => x.slice()), den: den.slice() });
      const S2 = S.map((row) => row.slice()), z2 = z.slice();
      for (let j = a; j < b; j++) for (let f = 0; f < F; f++) {
        z2[f] += k[j][f];
        for (let e = 0; e < D; e++) S2[f][e] += k[j][f] * v[j][e];
      }
      S = S2; z = z2;
      state += c * F * (D + 1);
      push({ kind: "write", rows, num, den });
    }
    return { frames, out, S, z, pairs, state, held: F * (D + 1) + Math.min(chunk, n) ** 2 };
  }

  window.effattn.linearStepper = { DEFAULTS, quadratic, simulate };

  class LinearStepper extends Stepper {
    static defaults = DEFAULTS;
    static lines = 3;
    static group = "Step through the chunks";
    static stage = "Picture of the pairs";

    controls() {
      const n = this.cfg.q.length, name = (c) => c === 1 ? "1: the recurrence" : c === n ? `${n}: the whole square` : String(c);
      const sizes = [...new Set([1, 2, 3, 4, n].filter((c) => c <= n))];
      return `<label>tokens per chunk <select data-set="chunk">${sizes.map((c) =>
        `<option value="${c}"${c === this.cfg.chunk ? " selected" : ""}>${name(c)}</option>`).join("")}</select></label>
        <label><input type="checkbox" data-set="normalize"${this.cfg.normalize ? " checked" : ""}> divide by the sum of weights</label>`;
    }

    compute() { return { run: simulate(this.cfg), truth: quadratic(this.cfg) }; }

    say(frame) {
      const span = ([a, b]) => (b - a === 1 ? `token ${a}` : `tokens ${a}–${b - 1}`);
      if (!frame) {
        return `Done: ${this.run.pairs + this.run.state} multiply-adds, at most ${this.run.held} numbers held. ` +
          `Largest difference from the masked square: ${maxDiff(this.run.out, this.truth).toExponential(1)}.`;
      }
      if (frame.kind === "read") return frame.rows[0] === 0 ? `The queries of ${span(frame.rows)} read the state: it is empty.`
        : `The queries of ${span(frame.rows)} read the state: Q S and Q z. That accounts for every earlier token, and visits none.`;
      if (frame.kind === "inside") return `Weights inside the chunk of ${span(frame.rows)}, upper half masked, are added` +
        (this.cfg.normalize ? "; then each output is divided by its sum of weights." : "; that is the output.");
      return `The keys and values of ${span(frame.rows)} are written: S + KᵀV, z + sum of k. The square is forgotten.`;
    }

    describe() {
      const n = this.cfg.q.length;
      return `${n} by ${n} pairs of queries and keys in chunks of ${this.cfg.chunk}.`;
    }

    picture(frame) {
      const { cfg } = this, n = cfg.q.length, w = 240 / n;
      // How far each query row has come: 0 nothing, 1 the past is read, 2 the chunk's square too.
      const done = (i) => {
        let level = 0;
        this.run.frames.slice(0, this.at + (frame ? 1 : 0)).forEach((f) => {
          if (i >= f.rows[0] && i < f.rows[1]) level = Math.max(level, f.kind === "read" ? 1 : 2);
        });
        return level;
      };
      let svg = "";
      for (let i = 0; i < n; i++) {
        const level = done(i), first = Math.floor(i / cfg.chunk) * cfg.chunk;
        for (let j = 0; j < n; j++) {
          const hidden = j > i, own = j >= first;
          const now = frame && frame.kind === "inside" && i >= frame.rows[0] && i < frame.rows[1] && own && j < frame.rows[1];
          const text = hidden ? "" : now ? fmt(frame.square[i - frame.rows[0]][j - first], 1) : !own && level > 0 ? "S" : "";
          svg += this.cell(i, j, w, { hidden, now: now && !hidden, past: own && level === 2, text });
        }
      }
      for (let a = 0; a < n; a += cfg.chunk) {
        const h = Math.min(cfg.chunk, n - a) * w;
        svg += `<rect x="${19.5 + a * w}" y="${15.5 + a * w}" width="${h}" height="${h}" fill="none" stroke="currentColor" stroke-width="1.4"/>`;
      }
      if (frame) {
        const [a, b] = frame.rows, read = frame.kind === "read", write = frame.kind === "write";
        const box = write ? [a, a, b - a, b - a] : read ? [0, a, Math.max(a, 0.15), b - a] : [a, a, b - a, b - a];
        svg += `<rect x="${18.5 + box[0] * w}" y="${14.5 + box[1] * w}" width="${box[2] * w + 2}" height="${box[3] * w + 2}" fill="none"
          stroke="#D55E00" stroke-width="2.5"${write ? ' stroke-dasharray="5 3"' : ""}/>`;
      }
      return svg;
    }

    tables(frame, done) {
      const row = (name, cells) => `<tr><th scope="row">${name}</th>${cells.map((x) => `<td>${x}</td>`).join("")}</tr>`;
      const values = this.cfg.v[0].map((_, c) => `value ${c}`);
      const head = (first, names) => `<thead><tr><th scope="col">${first}</th>${names.map((x) => `<th scope="col">${x}</th>`).join("")}</tr></thead>`;
      const tokens = !done ? frame.rows : [Math.max(0, this.run.out.length - 2), this.run.out.length];
      const shown = [];
      for (let t = tokens[0]; t < Math.min(tokens[1], frame.out.length); t++) shown.push(row(`token ${t}`, frame.out[t].map((x) => fmt(x))));
      return `
        <table><caption>The state, whatever the length</caption>${head("feature", ["S: " + values[0], ...values.slice(1), "z"])}
        <tbody>${frame.S.map((x, f) => row(f, [...x.map((x) => fmt(x)), fmt(frame.z[f])])).join("")}</tbody></table>
        <table><caption>Outputs</caption>${head("token", values)}<tbody>${shown.join("") || row("–", values.map(() => "–"))}</tbody></table>
        <table><caption>Multiply-adds so far: ${frame.pairs + frame.state}</caption><tbody>
        ${row("inside squares", [frame.pairs])}${row("with the state", [frame.state])}</tbody></table>`;
    }
  }

  const define = () => { if (!customElements.get("linear-stepper")) customElements.define("linear-stepper", LinearStepper); };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", define); else define();
})();
