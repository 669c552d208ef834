// <tile-stepper>: walk through the tiles of one small attention head, one at a time.
// The arithmetic is in pure functions (window.effattn.tileStepper); the browser test compares
// them with effattn_lab. The element only draws the frames that simulate() returns.
// needs: stepper
(function () {
  "use strict";

  const { Stepper, dot, maxDiff, fmt } = window.effattn.stepper;

  // One head, 8 tokens, head_dim 2. A {sim} body may replace any of these fields.
  const DEFAULTS = {
    q: [[1.2, 0.4], [-0.6, 1.1], [0.9, -1.3], [1.5, 0.8], [-1.1, 0.3], [0.2, 1.7], [1.8, -0.5], [0.7, 1.4]],
    k: [[0.5, -0.2], [1.1, 0.9], [-0.8, 1.2], [1.6, -0.4], [0.3, 1.5], [-1.2, -0.7], [1.9, 0.6], [0.8, 2.1]],
    v: [[1, 0], [0, 1], [2, 1], [-1, 2], [1, -1], [0, 2], [3, 0], [1, 1]],
    blockQ: 4, blockK: 2, causal: true, itemsize: 2, lseItemsize: 4,
  };

  // Bottom-right aligned causal rule: the queries are the last positions of the keys.
  const visible = (i, j, nq, nk, causal) => !causal || j <= i + nk - nq;

  // The plain computation: the whole row of scores at once. Returns {out: [nq][D], lse: [nq]}.
  function naive({ q, k, v, causal }) {
    const scale = 1 / Math.sqrt(q[0].length), out = [], lse = [];
    q.forEach((row, i) => {
      const s = k.map((key, j) => visible(i, j, q.length, k.length, causal) ? scale * dot(row, key) : -Infinity);
      const m = Math.max(...s), p = s.map((x) => Math.exp(x - m)), l = p.reduce((a, b) => a + b, 0);
      out.push(v[0].map((_, c) => p.reduce((sum, x, j) => sum + x * v[j][c], 0) / l));
      lse.push(m + Math.log(l));
    });
    return { out, lse };
  }

  // Key tiles [start, end) that a query tile [a, b) visits.
  function keyTiles(a, b, nq, nk, blockK, causal) {
    const end = causal ? Math.min(nk, b + nk - nq) : nk, tiles = [];
    for (let c = 0; c < end; c += blockK) tiles.push([c, Math.min(c + blockK, nk)]);
    return tiles;
  }

  // Frames of the tiled computation: load Q, one frame per visible tile, store O and LSE.
  function simulate(options) {
    const o = Object.assign({}, DEFAULTS, options);
    const { q, k, v, blockQ, blockK, causal } = o;
    const nq = q.length, nk = k.length, D = q[0].length, scale = 1 / Math.sqrt(D);
    const total = { Q: 0, K: 0, V: 0, O: 0, LSE: 0 }, frames = [], out = [], lse = [];
    let tiles = 0, rescales = 0;
    const push = (frame, moved) => {
      for (const name in moved) total[name] += moved[name];
      frames.push(Object.assign({ moved, total: Object.assign({}, total) }, frame));
    };
    for (let a = 0, qi = 0; a < nq; a += blockQ, qi++) {
      const b = Math.min(a + blockQ, nq), rows = [a, b], n = b - a;
      let m = Array(n).fill(-Infinity), l = Array(n).fill(0), acc = Array.from({ length: n }, () => Array(D).fill(0));
      push({ kind: "load", qi, rows, m, l, acc, alpha: Array(n).fill(null) }, { Q: n * D * o.itemsize });
      keyTiles(a, b, nq, nk, blockK, causal).forEach(([c, d], kj) => {
        const alpha = [], scores = [], m2 = [], l2 = [], acc2 = [];
        for (let r = 0; r < n; r++) {
          const s = [];
          for (let j = c; j < d; j++) s.push(visible(a + r, j, nq, nk, causal) ? scale * dot(q[a + r], k[j]) : -Infinity);
          const top = Math.max(m[r], ...s);
          // A row that has seen no key yet keeps m = -inf; shifting by 0 then gives p = 0, not NaN.
          const shift = top === -Infinity ? 0 : top;
          const f = Math.exp(m[r] - shift), p = s.map((x) => Math.exp(x - shift));
          if (m[r] !== -Infinity && top > m[r]) rescales++;
          m2.push(top); alpha.push(f); scores.push(s);
          l2.push(f * l[r] + p.reduce((x, y) => x + y, 0));
          acc2.push(acc[r].map((x, e) => f * x + p.reduce((sum, w, j) => sum + w * v[c + j][e], 0)));
        }
        m = m2; l = l2; acc = acc2; tiles++;
        const half = (d - c) * D * o.itemsize;
        push({ kind: "tile", qi, kj, rows, cols: [c, d], m, l, acc, alpha, scores }, { K: half, V: half });
      });
      acc.forEach((row, r) => {
        out.push(row.map((x) => (l[r] > 0 ? x / l[r] : 0)));
        lse.push(l[r] > 0 ? m[r] + Math.log(l[r]) : -Infinity);
      });
      push({ kind: "store", qi, rows, m, l, acc, alpha: Array(n).fill(null) },
        { O: n * D * o.itemsize, LSE: n * o.lseItemsize });
    }
    const all = Math.ceil(nq / blockQ) * Math.ceil(nk / blockK);
    const bytes = Object.values(total).reduce((x, y) => x + y, 0);
    return { frames, out, lse, tiles, skipped: all - tiles, rescales, bytes };
  }

  window.effattn.tileStepper = { DEFAULTS, naive, keyTiles, simulate };

  class TileStepper extends Stepper {
    static defaults = DEFAULTS;
    static lines = 2;
    static group = "Step through the tiles";
    static stage = "Tile picture";

    controls() {
      const { q, blockQ, blockK, causal } = this.cfg;
      const choose = (name, chosen) => `<select data-set="${name}">` +
        [1, 2, 3, 4, 8].filter((b) => b <= q.length).map((b) => `<option${b === chosen ? " selected" : ""}>${b}</option>`).join("") + "</select>";
      return `<label>queries per tile ${choose("blockQ", blockQ)}</label>
        <label>keys per tile ${choose("blockK", blockK)}</label>
        <label><input type="checkbox" data-set="causal"${causal ? " checked" : ""}> causal</label>`;
    }

    compute() { return { run: simulate(this.cfg), truth: naive(this.cfg) }; }

    say(frame) {
      const span = ([a, b]) => (b - a === 1 ? `${a}` : `${a}–${b - 1}`);
      if (!frame) {
        const gap = maxDiff(this.run.out, this.truth.out);
        return `Done: ${this.run.tiles} tiles computed, ${this.run.skipped} skipped, ${this.run.rescales} times a row's origin moved. ` +
          `Largest difference from the plain computation: ${gap.toExponential(1)}.`;
      }
      if (frame.kind === "load") return `Read queries ${span(frame.rows)} into fast memory. m = −∞, ℓ = 0, acc = 0.`;
      if (frame.kind === "store") return `Divide acc by ℓ, write output rows ${span(frame.rows)} and their log-sum-exp. This is the only write.`;
      return `Read keys and values ${span(frame.cols)}; scores of queries ${span(frame.rows)} exist only now. ` +
        (frame.alpha.some((f, r) => f < 1 && f > 0) ? "A new maximum: old sums are multiplied by α." : "No sum so far needs correcting.");
    }

    describe() {
      const { q, k, blockQ, blockK } = this.cfg;
      return `${q.length} by ${k.length} score matrix in tiles of ${blockQ} by ${blockK}.`;
    }

    picture(frame) {
      const { cfg, run } = this, nq = cfg.q.length, nk = cfg.k.length, w = 240 / Math.max(nq, nk);
      const past = new Set();
      run.frames.slice(0, this.at).forEach((f) => {
        if (f.kind === "tile") for (let i = f.rows[0]; i < f.rows[1]; i++) for (let j = f.cols[0]; j < f.cols[1]; j++) past.add(i * nk + j);
      });
      let svg = "";
      for (let i = 0; i < nq; i++) for (let j = 0; j < nk; j++) {
        const hidden = !visible(i, j, nq, nk, cfg.causal);
        const now = frame && frame.kind === "tile" && i >= frame.rows[0] && i < frame.rows[1] && j >= frame.cols[0] && j < frame.cols[1];
        const text = now && (hidden ? "×" : fmt(frame.scores[i - frame.rows[0]][j - frame.cols[0]], 1));
        svg += this.cell(i, j, w, { hidden, now, past: past.has(i * nk + j), text });
      }
      for (let a = 0; a < nq; a += cfg.blockQ) for (let c = 0; c < nk; c += cfg.blockK) {
        const h = Math.min(cfg.blockQ, nq - a), b = Math.min(cfg.blockK, nk - c);
        svg += `<rect x="${19.5 + c * w}" y="${15.5 + a * w}" width="${b * w}" height="${h * w}" fill="none" stroke="currentColor" stroke-width="1.2"/>`;
      }
      if (frame) svg += `<rect x="18" y="${14.5 + frame.rows[0] * w}" width="${nk * w + 3}" height="${(frame.rows[1] - frame.rows[0]) * w + 2}" fill="none" stroke="#D55E00" stroke-width="2.5"/>`;
      return svg;
    }

    tables(frame, done) {
      const rows = frame.m.map((m, r) => `<tr><th scope="row">${frame.rows[0] + r}</th><td>${fmt(m)}</td><td>${fmt(frame.alpha[r])}</td>` +
        `<td>${fmt(frame.l[r])}</td><td>${frame.acc[r].map((x) => fmt(x)).join(", ")}</td></tr>`).join("");
      const names = ["Q", "K", "V", "O", "LSE"], sum = names.reduce((s, x) => s + frame.total[x], 0);
      const cell = (x, plus) => `<td>${plus && x ? "+" : ""}${x || 0}</td>`;
      return `
        <table><caption>In fast memory (registers)</caption><thead><tr><th scope="col">query</th><th scope="col">m</th><th scope="col">α</th>
        <th scope="col">ℓ</th><th scope="col">acc</th></tr></thead><tbody>${rows}</tbody></table>
        <table><caption>Bytes across HBM: ${sum}</caption><thead><tr><td></td>${names.map((x) => `<th scope="col">${x}</th>`).join("")}</tr></thead>
        <tbody><tr><th scope="row">now</th>${names.map((x) => cell(done ? 0 : frame.moved[x], true)).join("")}</tr>
        <tr><th scope="row">so far</th>${names.map((x) => cell(frame.total[x])).join("")}</tr></tbody></table>`;
    }
  }

  const define = () => { if (!customElements.get("tile-stepper")) customElements.define("tile-stepper", TileStepper); };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", define); else define();
})();
