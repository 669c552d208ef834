// <code-explorer>: a query and two keys of sixteen coordinates, transformed or not, cut into four buckets, packed and
// compared. The arithmetic is in pure functions (window.effattn.codeExplorer); the browser test compares them with
// effattn_lab.sparse.codes. The element only draws what they return.
(function () {
  "use strict";

  // A {sim} body may replace any of these fields. Two channels of the query hold most of its energy; key B agrees with
  // it there and nowhere else, key A everywhere else.
  const DEFAULTS = {
    t: 2, maxT: 12, transform: true, lengthA: 1, lengthB: 1,
    q: [6, 0.8, -1.0, 0.7, -5, 1.2, 0.9, -0.6, 0.5, -1.3, 0.8, 1.1, -0.7, 0.9, -1.0, 0.6],
    a: [-5, 0.9, -0.8, 0.5, 4.5, 1.0, 1.1, -0.9, 0.7, -1.0, 0.6, 0.9, -1.2, 0.4, -0.8, 1.1],
    b: [5, -0.6, 0.9, -0.4, -4.5, -1.1, -0.8, 0.7, -0.9, 1.2, -0.5, -1.0, 0.8, -0.6, 0.9, -0.8],
  };

  const dot = (x, y) => x.reduce((sum, v, i) => sum + v * y[i], 0);
  const scale = (x, c) => x.map((v) => v * c);

  // x H with the orthonormal Sylvester matrix: rounds of sums and differences, partners 1, 2, 4, ... apart.
  function hadamard(x) {
    let y = x.slice();
    for (let half = 1; half < y.length; half *= 2) {
      const next = y.slice();
      for (let i = 0; i < y.length; i++) if (!(i & half)) { next[i] = y[i] + y[i + half]; next[i + half] = y[i] - y[i + half]; }
      y = next;
    }
    return scale(y, 1 / Math.sqrt(x.length));
  }

  const bucketize = (x, t) => x.map((v) => Number(v > -t) + Number(v > 0) + Number(v > t));

  // Sixteen codes to a signed 32-bit word, coordinate i in bits 2 i and 2 i + 1.
  function pack(codes) {
    const words = [];
    for (let w = 0; w < codes.length; w += 16) words.push(codes.slice(w, w + 16).reduce((word, c, i) => word | (c << (2 * i)), 0));
    return words;
  }

  function popcount(x) {
    let n = 0;
    for (; x; x &= x - 1) n += 1;
    return n;
  }

  const LOW = 0x55555555;
  const parts = (a, b) => a.map((word, i) => {
    const x = word ^ b[i], lo = x & LOW, hi = (x >>> 1) & LOW;
    return { low: popcount(lo), high: popcount(hi), both: popcount(lo & hi & (word ^ (word >>> 1))) };
  });
  const l1 = (a, b) => parts(a, b).reduce((sum, p) => sum + p.low + 2 * p.high - 2 * p.both, 0);
  const released = (a, b) => parts(a, b).reduce((sum, p) => sum + p.low + 2 * p.high, 0);
  const signs = (a, b) => a.filter((c, i) => (c > 1) !== (b[i] > 1)).length;

  // All that is shown, for one setting.
  function state(o) {
    const turn = (x) => o.transform ? hadamard(x) : x.slice();
    const vectors = { q: o.q, a: scale(o.a, o.lengthA), b: scale(o.b, o.lengthB) }, rows = {};
    for (const [name, x] of Object.entries(vectors)) {
      const y = turn(x), codes = bucketize(y, o.t);
      rows[name] = { x, y, codes, words: pack(codes) };
    }
    const keys = {};
    for (const name of ["a", "b"]) {
      const r = rows[name];
      keys[name] = {
        product: dot(o.q, r.x) / Math.sqrt(o.q.length), l1: l1(rows.q.words, r.words), released: released(rows.q.words, r.words),
        signs: signs(rows.q.codes, r.codes), far: Math.hypot(...r.x.map((v, i) => v - o.q[i])),
        middle: r.codes.filter((c, i) => c + rows.q.codes[i] === 3 && (c === 1 || c === 2)).length,
      };
    }
    return { rows, keys };
  }

  window.effattn = window.effattn || {};
  window.effattn.codeExplorer = { DEFAULTS, hadamard, bucketize, pack, popcount, l1, released, signs, state };

  const CSS = `
  code-explorer { display:block; border:1px solid var(--pst-color-border,#999); border-radius:6px; padding:.8rem; margin:1rem 0;
    color:var(--pst-color-text-base,#222); font-size:.92rem }
  code-explorer .ce-bar { display:flex; flex-wrap:wrap; gap:.5rem 1rem; align-items:center; margin-bottom:.6rem }
  code-explorer .ce-slide { flex:1 1 170px; min-width:0 }
  code-explorer .ce-slide input { width:100%; min-height:1.8rem; accent-color:var(--pst-color-primary,#0072b2) }
  code-explorer .ce-check { display:inline-flex; gap:.4rem; align-items:center; min-height:2.2rem }
  code-explorer .ce-check input { width:1.2rem; height:1.2rem; accent-color:var(--pst-color-primary,#0072b2) }
  code-explorer button { font:inherit; color:inherit; background:var(--pst-color-surface,#eee); border:1px solid var(--pst-color-text-muted,#666);
    border-radius:4px; padding:.25rem .7rem; min-height:2.2rem }
  code-explorer :is(button,input):focus-visible { outline:3px solid var(--pst-color-primary,#0072b2); outline-offset:2px }
  code-explorer .ce-stage { display:flex; flex-wrap:wrap; gap:.4rem 1.2rem; align-items:flex-start }
  code-explorer svg { flex:1 1 290px; max-width:470px; width:100%; height:auto }
  code-explorer .ce-side { flex:1 1 250px; min-width:0 }
  code-explorer .ce-say { margin:0 0 .5rem; min-height:4.5em }
  code-explorer table { color:inherit; border-collapse:collapse; width:100%; margin:0 0 .6rem; font-variant-numeric:tabular-nums; font-size:.9rem }
  code-explorer :is(th,td) { padding:.15rem .3rem; text-align:right; border-bottom:1px solid var(--pst-color-border,#ccc) }
  code-explorer th[scope=row] { text-align:left; font-weight:400 }
  code-explorer td.ce-best { font-weight:700; text-decoration:underline }
  code-explorer caption { text-align:left; caption-side:top; color:inherit; padding:0 0 .2rem }
  code-explorer .ce-words { font-family:var(--pst-font-family-monospace,monospace); font-size:.8em }
  code-explorer svg text { font-size:10px; fill:currentColor }
  code-explorer svg .axis { stroke:var(--pst-color-text-muted,#777); stroke-width:.8 }
  code-explorer svg .level { stroke:var(--pst-color-text-muted,#777); stroke-dasharray:4 3; stroke-width:.8 }`;

  const COLORS = ["#D55E00", "#E69F00", "#56B4E9", "#0072B2"]; // codes 0 .. 3, which are also written below the bars
  const NAMES = { q: "query", a: "key A", b: "key B" };
  const num = (x, d) => x.toFixed(d).replace("-", "−");
  const hex = (word) => (word >>> 0).toString(16).padStart(8, "0");

  class CodeExplorer extends HTMLElement {
    connectedCallback() {
      if (this.ready) return;
      this.ready = true;
      const body = this.querySelector('script[type="application/json"]');
      this.start = Object.assign({}, DEFAULTS, body && body.textContent.trim() ? JSON.parse(body.textContent) : {});
      if (!document.getElementById("code-explorer-css")) {
        const style = document.createElement("style");
        style.id = "code-explorer-css"; style.textContent = CSS; document.head.append(style);
      }
      const slide = (name, text, min, max, step) => `<label class="ce-slide">${text} <output data-of="${name}"></output>
        <input type="range" data-set="${name}" min="${min}" max="${max}" step="${step}"></label>`;
      const shell = document.createElement("div");
      shell.innerHTML = `
        <div class="ce-bar"><label class="ce-check"><input type="checkbox" data-set="transform"> Hadamard transform first</label>
          <button type="button" data-do="reset">Start again</button></div>
        <div class="ce-bar">${slide("t", "thresholds ±", 0.1, this.start.maxT, 0.1)}${slide("lengthA", "key A, length ×", 0.5, 3, 0.1)}
          ${slide("lengthB", "key B, length ×", 0.5, 3, 0.1)}</div>
        <div class="ce-stage"><svg viewBox="0 0 380 336" role="img"></svg>
          <div class="ce-side"><p class="ce-say" role="status" aria-live="polite"></p>
          <table><caption>Underlined: the key that a rule would choose</caption><thead><tr><td></td><th scope="col">key A</th><th scope="col">key B</th></tr></thead>
          <tbody></tbody></table></div></div>`;
      this.append(shell);
      this.addEventListener("input", (e) => { if (e.target.dataset.set) this.draw(); });
      this.addEventListener("click", (e) => { if (e.target.closest('[data-do="reset"]')) this.reset(); });
      this.reset();
    }

    reset() {
      for (const input of this.querySelectorAll("[data-set]")) {
        if (input.type === "checkbox") input.checked = this.start.transform; else input.value = this.start[input.dataset.set];
      }
      this.draw();
    }

    draw() {
      const now = Object.assign({}, this.start);
      for (const input of this.querySelectorAll("[data-set]")) now[input.dataset.set] = input.type === "checkbox" ? input.checked : Number(input.value);
      for (const name of ["t", "lengthA", "lengthB"]) this.querySelector(`[data-of="${name}"]`).textContent = num(now[name], 1);
      const { rows, keys } = state(now);
      this.words(now, keys);
      this.table(rows, keys);
      this.bars(now, rows);
    }

    words(now, keys) {
      const best = keys.a.product > keys.b.product ? "a" : "b", other = best === "a" ? "b" : "a";
      const near = keys.a.l1 === keys.b.l1 ? null : keys.a.l1 < keys.b.l1 ? "a" : "b";
      const far = keys[best].far > keys[other].far;
      this.querySelector(".ce-say").textContent = `Softmax prefers ${NAMES[best]}, whose score is ${num(keys[best].product, 1)}. ` +
        (near === null ? "Both codes are equally far: a tie." : near === best ? `So do the codes: distance ${keys[near].l1} against ${keys[other].l1}.`
          : `The codes choose ${NAMES[near]}: distance ${keys[near].l1} against ${keys[best].l1}.`) +
        (far ? ` And ${NAMES[best]} is the farther one in exact distance, too.` : "");
    }

    table(rows, keys) {
      const row = (name, pick, d, least) => {
        const [a, b] = [keys.a[pick], keys.b[pick]], win = a === b || least === null ? null : (a < b) === least ? "a" : "b";
        const cell = (k, x) => `<td${win === k ? ' class="ce-best"' : ""}>${num(x, d)}</td>`;
        return `<tr><th scope="row">${name}</th>${cell("a", a)}${cell("b", b)}</tr>`;
      };
      this.querySelector("tbody").innerHTML = row("score q·k/√D", "product", 1, false) + row("L1 of codes", "l1", 0, true) +
        row("low bits + 2 × high bits", "released", 0, true) + row("pairs of codes 1 and 2", "middle", 0, null) +
        row("signs that differ", "signs", 0, true) + row("exact distance", "far", 1, true) +
        `<tr><th scope="row">word (query ${rows.q.words.map(hex).join(" ")})</th>${["a", "b"].map((k) =>
          `<td class="ce-words">${rows[k].words.map(hex).join(" ")}</td>`).join("")}</tr>`;
    }

    bars(now, rows) {
      const n = now.q.length, x0 = 40, w = 332 / n, top = Math.max(now.t * 1.05, ...Object.values(rows).flatMap((r) => r.y.map(Math.abs)));
      let svg = `<title>${["q", "a", "b"].map((k) => `${NAMES[k]}: codes ${rows[k].codes.join(" ")}`).join("; ")}.</title>`;
      ["q", "a", "b"].forEach((name, r) => {
        const mid = 50 + r * 112, H = (v) => (v / top) * 42, { y, codes } = rows[name];
        svg += `<text x="2" y="${mid - 32}">${NAMES[name]}</text>`;
        for (const level of [now.t, -now.t]) svg += `<line class="level" x1="${x0 - 4}" x2="376" y1="${mid - H(level)}" y2="${mid - H(level)}"/>`;
        svg += `<text x="${x0 - 7}" y="${mid - H(now.t) + 3}" text-anchor="end">${num(now.t, 1)}</text><line class="axis" x1="${x0 - 4}" x2="376" y1="${mid}" y2="${mid}"/>`;
        y.forEach((v, i) => {
          const at = x0 + i * w;
          svg += `<rect x="${at + 1}" y="${Math.min(mid, mid - H(v))}" width="${w - 3}" height="${Math.max(0.6, Math.abs(H(v)))}" fill="${COLORS[codes[i]]}" stroke="currentColor" stroke-width=".5"/>` +
            `<text x="${at + w / 2 - 1}" y="${mid + 57}" text-anchor="middle">${codes[i]}</text>`;
        });
        svg += `<text x="2" y="${mid + 57}">code</text>`;
      });
      this.querySelector("svg").innerHTML = svg;
    }
  }

  const define = () => { if (!customElements.get("code-explorer")) customElements.define("code-explorer", CodeExplorer); };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", define); else define();
})();
