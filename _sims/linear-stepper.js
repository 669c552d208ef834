// <linear-stepper>: walk through causal linear attention of one small head, chunk by chunk.
// Chunks of 1 are the recurrence, one chunk of all tokens is the masked square: three forms, one control.
// The arithmetic is in pure functions (window.effattn.linearStepper); the browser test compares them with
// effattn_lab. The element only draws the frames that simulate() returns.
(function () {
  "use strict";

  // One head, 8 tokens, 2 features (positive already) and 2 values. A {sim} body may replace any of these fields.
  const DEFAULTS = {
    q: [[1.2, 0.4], [0.6, 1.1], [0.9, 0.3], [1.5, 0.8], [0.2, 0.9], [0.3, 1.7], [1.8, 0.5], [0.7, 1.4]],
    k: [[0.5, 0.2], [1.1, 0.9], [0.3, 1.2], [1.6, 0.4], [0.3, 1.5], [1.2, 0.7], [1.9, 0.6], [0.8, 2.1]],
    v: [[1, 0], [0, 1], [2, 1], [-1, 2], [1, -1], [0, 2], [3, 0], [1, 1]],
    chunk: 2, normalize: true, eps: 1e-6,
  };

  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);
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

  // Largest absolute difference of two [n][D] tables.
  const maxDiff = (a, b) => Math.max(...a.map((row, i) => Math.max(...row.map((x, c) => Math.abs(x - b[i][c])))));

  window.effattn = window.effattn || {};
  window.effattn.linearStepper = { DEFAULTS, quadratic, simulate, maxDiff };

  const CSS = `
  linear-stepper { display:block; border:1px solid var(--pst-color-border,#999); border-radius:6px; padding:.8rem; margin:1rem 0;
    color:var(--pst-color-text-base,#222); font-size:.92rem }
  linear-stepper .ls-bar { display:flex; flex-wrap:wrap; gap:.5rem .9rem; align-items:center; margin-bottom:.6rem }
  linear-stepper button, linear-stepper select { font:inherit; color:inherit; background:var(--pst-color-surface,#eee);
    border:1px solid var(--pst-color-text-muted,#666); border-radius:4px; padding:.25rem .7rem; min-height:2.2rem; max-width:100% }
  linear-stepper button:disabled { opacity:.5 }
  linear-stepper :is(button,select,input,.ls-stage):focus-visible { outline:3px solid var(--pst-color-primary,#0072b2); outline-offset:2px }
  linear-stepper .ls-stage { display:flex; flex-wrap:wrap; gap:1rem; align-items:flex-start }
  linear-stepper svg { flex:1 1 240px; max-width:340px; width:100%; height:auto }
  linear-stepper .ls-side { flex:1 1 250px; min-width:0 }
  linear-stepper .ls-say { min-height:4.4em; margin:0 0 .5rem }
  linear-stepper table { color:inherit; border-collapse:collapse; width:100%; margin:0 0 .6rem; font-variant-numeric:tabular-nums; font-size:.88rem }
  linear-stepper th, linear-stepper td { padding:.12rem .3rem; text-align:right; border-bottom:1px solid var(--pst-color-border,#ccc) }
  linear-stepper caption { text-align:left; caption-side:top; font-weight:600; color:inherit; padding:0 0 .2rem }
  linear-stepper svg text { font-size:9px; fill:currentColor }
  linear-stepper svg .on { fill:#fff } linear-stepper svg .lab { font-size:10px }`;

  const fmt = (x) => x.toFixed(2).replace("-", "−");

  class LinearStepper extends HTMLElement {
    connectedCallback() {
      if (this.ready) return;
      this.ready = true;
      const body = this.querySelector('script[type="application/json"]');
      this.cfg = Object.assign({}, DEFAULTS, body && body.textContent.trim() ? JSON.parse(body.textContent) : {});
      if (!document.getElementById("linear-stepper-css")) {
        const style = document.createElement("style");
        style.id = "linear-stepper-css"; style.textContent = CSS; document.head.append(style);
      }
      const n = this.cfg.q.length, name = (c) => c === 1 ? "1: the recurrence" : c === n ? `${n}: the whole square` : String(c);
      const sizes = [...new Set([1, 2, 3, 4, n].filter((c) => c <= n))];
      const shell = document.createElement("div");
      shell.innerHTML = `
        <div class="ls-bar">
          <label>tokens per chunk <select data-set="chunk">${sizes.map((c) =>
            `<option value="${c}"${c === this.cfg.chunk ? " selected" : ""}>${name(c)}</option>`).join("")}</select></label>
          <label><input type="checkbox" data-set="normalize"${this.cfg.normalize ? " checked" : ""}> divide by the sum of weights</label>
        </div>
        <div class="ls-bar" role="group" aria-label="Step through the chunks">
          <button type="button" data-do="reset">Start</button><button type="button" data-do="back">Back</button>
          <button type="button" data-do="step">Step</button><button type="button" data-do="play" aria-pressed="false">Play</button>
          <button type="button" data-do="end">End</button><span class="ls-count"></span>
        </div>
        <div class="ls-stage" tabindex="0" role="group" aria-label="Picture of the pairs: left and right arrows step, space plays">
          <svg viewBox="0 0 262 262" role="img"></svg>
          <div class="ls-side"><p class="ls-say" aria-live="polite"></p><div class="ls-tables"></div></div>
        </div>`;
      this.append(shell);
      this.addEventListener("click", (e) => { const b = e.target.closest("button[data-do]"); if (b) this.act(b.dataset.do); });
      this.addEventListener("change", (e) => {
        const field = e.target.dataset.set;
        if (!field) return;
        this.cfg[field] = field === "normalize" ? e.target.checked : Number(e.target.value);
        this.restart();
      });
      this.querySelector(".ls-stage").addEventListener("keydown", (e) => {
        const what = { ArrowRight: "step", ArrowLeft: "back", Home: "reset", End: "end", " ": "play" }[e.key];
        if (what) { e.preventDefault(); this.act(what); }
      });
      this.restart();
    }

    disconnectedCallback() { this.stop(); }

    restart() {
      this.stop();
      this.run = simulate(this.cfg);
      this.truth = quadratic(this.cfg);
      this.at = 0;
      this.draw();
    }

    act(what) {
      const last = this.run.frames.length;
      if (what !== "play") this.stop();
      if (what === "reset") this.at = 0;
      if (what === "back") this.at = Math.max(0, this.at - 1);
      if (what === "step") this.at = Math.min(last, this.at + 1);
      if (what === "end") this.at = last;
      if (what === "play") {
        if (this.timer) { this.stop(); return this.draw(); }
        if (this.at === last) this.at = 0;
        this.timer = setInterval(() => { this.at += 1; if (this.at >= last) this.stop(); this.draw(); }, 1100);
      }
      this.draw();
    }

    stop() {
      if (this.timer) clearInterval(this.timer);
      this.timer = null;
    }

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

    draw() {
      const { cfg, run } = this, frame = this.at < run.frames.length ? run.frames[this.at] : null;
      this.querySelector(".ls-count").textContent = `step ${this.at} of ${run.frames.length}`;
      this.querySelector('[data-do="back"]').disabled = this.at === 0;
      this.querySelector('[data-do="step"]').disabled = !frame;
      const play = this.querySelector('[data-do="play"]');
      play.textContent = this.timer ? "Pause" : "Play"; play.setAttribute("aria-pressed", String(Boolean(this.timer)));
      const say = this.querySelector(".ls-say"), words = this.say(frame);
      if (say.textContent !== words) say.textContent = words;
      this.drawGrid(frame);
      this.drawTables(frame || Object.assign({}, run.frames[run.frames.length - 1], { rows: null }));
      this.querySelector("svg").setAttribute("aria-label",
        `${cfg.q.length} by ${cfg.q.length} pairs of queries and keys in chunks of ${cfg.chunk}. ${words}`);
    }

    drawGrid(frame) {
      const { cfg } = this, n = cfg.q.length, w = 240 / n;
      // How far each query row has come: 0 nothing, 1 the past is read, 2 the chunk's square too.
      const done = (i) => {
        let level = 0;
        this.run.frames.slice(0, this.at + (frame ? 1 : 0)).forEach((f) => {
          if (i >= f.rows[0] && i < f.rows[1]) level = Math.max(level, f.kind === "read" ? 1 : 2);
        });
        return level;
      };
      let svg = `<defs><pattern id="ls-hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
        <rect width="2" height="6" fill="var(--pst-color-text-muted,#777)" opacity=".45"/></pattern></defs>
        <text class="lab" x="142" y="9" text-anchor="middle">keys →</text>
        <text class="lab" x="9" y="142" text-anchor="middle" transform="rotate(-90 9 142)">← queries</text>`;
      for (let i = 0; i < n; i++) {
        const level = done(i), first = Math.floor(i / cfg.chunk) * cfg.chunk;
        for (let j = 0; j < n; j++) {
          const x = 20 + j * w, y = 16 + i * w, own = j >= first;
          const now = frame && frame.kind === "inside" && i >= frame.rows[0] && i < frame.rows[1] && own && j < frame.rows[1];
          const fill = j > i ? "url(#ls-hatch)" : now ? "#0072B2" : own && level === 2 ? "var(--pst-color-border,#ccc)" : "none";
          svg += `<rect x="${x}" y="${y}" width="${w - 1}" height="${w - 1}" fill="${fill}" stroke="var(--pst-color-text-muted,#777)" stroke-width=".4"/>`;
          const text = j > i ? "" : now ? frame.square[i - frame.rows[0]][j - first].toFixed(1) : !own && level > 0 ? "S" : "";
          if (text) svg += `<text class="${now ? "on" : ""}" x="${x + w / 2}" y="${y + w / 2 + 3}" text-anchor="middle">${text}</text>`;
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
      this.querySelector("svg").innerHTML = svg;
    }

    drawTables(frame) {
      const row = (name, cells) => `<tr><th scope="row">${name}</th>${cells.map((x) => `<td>${x}</td>`).join("")}</tr>`;
      const values = this.cfg.v[0].map((_, c) => `value ${c}`);
      const head = (first, names) => `<thead><tr><th scope="col">${first}</th>${names.map((x) => `<th scope="col">${x}</th>`).join("")}</tr></thead>`;
      const tokens = frame.rows ? frame.rows : [Math.max(0, this.run.out.length - 2), this.run.out.length];
      const shown = [];
      for (let t = tokens[0]; t < Math.min(tokens[1], frame.out.length); t++) shown.push(row(`token ${t}`, frame.out[t].map(fmt)));
      this.querySelector(".ls-tables").innerHTML = `
        <table><caption>The state, whatever the length</caption>${head("feature", ["S: " + values[0], ...values.slice(1), "z"])}
        <tbody>${frame.S.map((x, f) => row(f, [...x.map(fmt), fmt(frame.z[f])])).join("")}</tbody></table>
        <table><caption>Outputs</caption>${head("token", values)}<tbody>${shown.join("") || row("–", values.map(() => "–"))}</tbody></table>
        <table><caption>Multiply-adds so far: ${frame.pairs + frame.state}</caption><tbody>
        ${row("inside squares", [frame.pairs])}${row("with the state", [frame.state])}</tbody></table>`;
    }
  }

  const define = () => { if (!customElements.get("linear-stepper")) customElements.define("linear-stepper", LinearStepper); };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", define); else define();
})();
