// <mask-explorer>: a fixed attention pattern as a mask; what it costs in pairs and in tiles, how far it reaches, what it loses.
// The arithmetic is in pure functions (window.effattn.maskExplorer); the browser test compares them with
// effattn_lab.sparse: masks, kinds of tiles, captured mass.
(function () {
  "use strict";

  const DEFAULTS = { tokens: 48, pattern: "strided", tile: 8, query: 47, head_dim: 64 };

  // Each pattern: label, its numbers [key, label, value, least], and the rule (i: query, j: key).
  const PATTERNS = {
    causal: { label: "full, causal", numbers: [], causal: true, rule: () => (i, j) => j <= i },
    window: { label: "sinks and window", numbers: [["sinks", "sinks s", 2, 0], ["window", "window w", 8, 1]], causal: true,
      rule: (p) => (i, j) => j <= i && (j < p.sinks || i - j < p.window) },
    strided: { label: "strided", numbers: [["stride", "stride l", 7, 1]], causal: true,
      rule: (p) => (i, j) => j <= i && (i - j <= p.stride || (i - j) % p.stride === 0) },
    fixed: { label: "fixed", numbers: [["stride", "block l", 8, 1], ["summary", "summary cells c", 1, 1]], causal: true,
      rule: (p) => (i, j) => j <= i && (Math.floor(i / p.stride) === Math.floor(j / p.stride) || j % p.stride >= p.stride - p.summary) },
    longformer: { label: "Longformer (both ways)", numbers: [["half", "half window w/2", 4, 1], ["globals", "global tokens", 1, 0]], causal: false,
      rule: (p) => (i, j) => Math.abs(i - j) <= p.half || i < p.globals || j < p.globals },
    longnet: { label: "LongNet (r = 1, 2, 4, …)", numbers: [["segment", "first segment", 6, 1], ["patterns", "patterns", 4, 1]], causal: true,
      rule: (p) => (i, j) => {
        if (j > i) return false;
        for (let m = 0, w = p.segment, r = 1; m < p.patterns; m++, w *= 2, r *= 2) {
          if (Math.floor(i / w) === Math.floor(j / w) && (i % w) % r === 0 && (j % w) % r === 0) return true;
        }
        return false;
      } },
  };

  const dense = (rule, n) => Array.from({ length: n }, (_, i) => Array.from({ length: n }, (_, j) => rule(i, j)));

  // 0: nothing seen, 1: some, 2: all that exists. [ceil(n / tile)][ceil(n / tile)]
  function kinds(keep, tile) {
    const n = keep.length, m = Math.ceil(n / tile);
    return Array.from({ length: m }, (_, a) => Array.from({ length: m }, (_, b) => {
      let seen = 0, all = 0;
      for (let i = a * tile; i < Math.min(n, (a + 1) * tile); i++) for (let j = b * tile; j < Math.min(n, (b + 1) * tile); j++) {
        all += 1; seen += keep[i][j] ? 1 : 0;
      }
      return seen === 0 ? 0 : seen === all ? 2 : 1;
    }));
  }

  // FLOPs: 4 D a pair. A kernel works on whole tiles and reads tile keys and values (2 bytes an element) for each.
  function cost(keep, tile, headDim) {
    const kind = kinds(keep, tile), flat = kind.flat(), read = flat.filter((x) => x > 0).length;
    const pairs = keep.reduce((t, row) => t + row.filter(Boolean).length, 0);
    return { pairs, flops: 4 * headDim * pairs, tiles: read, whole: flat.filter((x) => x === 2).length, all_tiles: flat.length,
      tile_flops: 4 * headDim * tile * tile * read, bytes: 4 * headDim * tile * read,
      last: keep[keep.length - 1].filter(Boolean).length };
  }

  // Layers until every token knows all that it may know (in causal patterns: its past); null if never.
  function layers(keep, causal) {
    const n = keep.length;
    let known = keep.map((_, i) => keep.map((_, j) => i === j));
    const whole = (k) => k.every((row, i) => row.every((x, j) => x || (causal && j > i)));
    for (let count = 0; count <= n; count++) {
      if (whole(known)) return count;
      const next = known.map((row, i) => row.map((x, j) => x || keep[i].some((see, m) => see && known[m][j])));
      if (next.every((row, i) => row.every((x, j) => x === known[i][j]))) return null;
      known = next;
    }
    return null;
  }

  // Scores of an example head: near keys score high, token 0 is a sink, key 17 is what the query looks for.
  const NEEDLE = 17;
  const score = (i, j) => 3 * Math.exp(-Math.abs(i - j) / 4) + (j === 0 ? 3 : 0) + (j === NEEDLE ? 3.5 : 0);

  function weights(i, n, causal) {
    const e = Array.from({ length: n }, (_, j) => (causal && j > i ? 0 : Math.exp(score(i, j))));
    const sum = e.reduce((a, b) => a + b, 0);
    return e.map((x) => x / sum);
  }

  // Share of each query's full softmax that the pattern keeps.
  const captured = (keep, causal) => keep.map((row, i) => weights(i, row.length, causal).reduce((t, p, j) => t + (row[j] ? p : 0), 0));

  window.effattn = window.effattn || {};
  window.effattn.maskExplorer = { DEFAULTS, PATTERNS, NEEDLE, dense, kinds, cost, layers, score, weights, captured };

  const CSS = `
  mask-explorer { display:block; border:1px solid var(--pst-color-border,#999); border-radius:6px; padding:.9rem; margin:1rem 0;
    color:var(--pst-color-text-base,#222); font-size:.95rem }
  mask-explorer fieldset { border:0; padding:0; margin:0 0 .7rem; min-width:0; display:grid; gap:.5rem .8rem;
    grid-template-columns:repeat(auto-fit,minmax(128px,1fr)) }
  mask-explorer legend { font-weight:600; font-size:1em; margin:0; padding:0; float:none; width:100%; grid-column:1/-1 }
  mask-explorer label { display:block; font-size:.88em; margin:0 0 .15rem; color:var(--pst-color-text-base,#222) }
  mask-explorer :is(input,select) { font:inherit; font-size:1rem; color:inherit; background:var(--pst-color-surface,#f4f4f4); width:100%;
    min-height:2.3rem; border:1px solid var(--pst-color-text-muted,#666); border-radius:4px; padding:.15rem .4rem; box-sizing:border-box }
  mask-explorer :is(input,select,.me-scroll):focus-visible { outline:3px solid var(--pst-color-primary,#0072b2); outline-offset:1px }
  mask-explorer input[aria-invalid=true] { border:2px solid var(--pst-color-danger,#b00020) }
  mask-explorer [hidden] { display:none !important }
  mask-explorer .me-say { margin:.2rem 0 .7rem; font-size:1.02em }
  mask-explorer .me-out { display:flex; flex-wrap:wrap; gap:1rem; align-items:flex-start }
  mask-explorer svg { flex:1 1 300px; max-width:430px; width:100%; height:auto }
  mask-explorer .me-scroll { flex:1 1 240px; min-width:0; overflow-x:auto }
  mask-explorer table { border-collapse:collapse; width:100%; margin:0 0 .6rem; font-variant-numeric:tabular-nums; font-size:.92em }
  mask-explorer :is(th,td) { padding:.25rem .4rem; text-align:right; border-bottom:1px solid var(--pst-color-border,#ccc) }
  mask-explorer th[scope=row] { text-align:left; font-weight:normal }
  mask-explorer caption { caption-side:top; text-align:left; color:inherit; font-weight:600; padding:0 0 .2rem }
  mask-explorer svg text { font-size:11px; fill:var(--pst-color-text-base,#222) }
  mask-explorer svg .future { fill:none; stroke:var(--pst-color-border,#bbb); stroke-width:1 }
  mask-explorer svg .seen { fill:#0072b2 }
  mask-explorer svg .partial { fill:#e69f00; fill-opacity:.35 }
  mask-explorer svg .whole { fill:#56b4e9; fill-opacity:.35 }
  mask-explorer svg .row { fill:none; stroke:#d55e00; stroke-width:1.6 }
  mask-explorer svg .lost { fill:none; stroke:#d55e00; stroke-width:1.2 }
  mask-explorer svg .kept { fill:#0072b2 }`;

  const percent = (x, y) => { const p = (100 * x) / y; return (p >= 9.95 || p === 0 ? p.toFixed(0) : p.toFixed(1)) + " %"; };
  const count = (x) => Math.round(x).toLocaleString("en");

  class MaskExplorer extends HTMLElement {
    connectedCallback() {
      if (this.ready) return;
      this.ready = true;
      const data = this.querySelector('script[type="application/json"]');
      this.cfg = Object.assign({}, DEFAULTS, data ? JSON.parse(data.textContent) : {});
      if (!document.getElementById("mask-explorer-css")) {
        const style = document.createElement("style");
        style.id = "mask-explorer-css"; style.textContent = CSS; document.head.append(style);
      }
      const last = this.cfg.tokens - 1, tiles = [1, 2, 4, 8, 16].filter((t) => t <= this.cfg.tokens);
      this.innerHTML = `<fieldset><legend>Mask explorer: ${this.cfg.tokens} tokens</legend>
        <div><label for="me-pattern">Pattern</label><select id="me-pattern" data-key="pattern">${Object.entries(PATTERNS).map(([key, p]) =>
          `<option value="${key}"${key === this.cfg.pattern ? " selected" : ""}>${p.label}</option>`).join("")}</select></div>
        <div><label for="me-tile">Tile of the kernel</label><select id="me-tile" data-key="tile">${tiles.map((t) =>
          `<option value="${t}"${t === this.cfg.tile ? " selected" : ""}>${t} × ${t}</option>`).join("")}</select></div>
        <div><label for="me-query">Query (0 to ${last})</label><input id="me-query" data-key="query" type="number" min="0" max="${last}" step="1"
          value="${Math.min(this.cfg.query, last)}"></div></fieldset>
        <fieldset class="me-numbers"><legend>Numbers of the pattern</legend></fieldset>
        <p class="me-say" role="status" aria-live="polite"></p>
        <div class="me-out"><svg viewBox="0 0 330 400" role="img"></svg>
        <div class="me-scroll" tabindex="0" role="region" aria-label="Table of the pattern's cost"></div></div>`;
      this.addEventListener("input", (event) => { if (event.target.dataset.key === "pattern") this.fields(); this.update(); });
      this.fields();
      this.update();
    }

    fields() {
      const pattern = PATTERNS[this.querySelector("#me-pattern").value], box = this.querySelector(".me-numbers");
      box.hidden = pattern.numbers.length === 0;
      box.innerHTML = `<legend>Numbers of the pattern</legend>` + pattern.numbers.map(([key, label, value, least]) =>
        `<div><label for="me-${key}">${label}</label><input id="me-${key}" data-number="${key}" type="number" inputmode="numeric"
          min="${least}" max="${this.cfg.tokens}" step="1" value="${value}"></div>`).join("");
    }

    read() {
      const values = {};
      let bad = null;
      this.querySelectorAll("input").forEach((field) => {
        const x = Number(field.value), low = Number(field.min), high = Number(field.max);
        const ok = field.value !== "" && Number.isInteger(x) && x >= low && x <= high;
        field.setAttribute("aria-invalid", String(!ok));
        if (!ok) bad = bad || `${field.labels[0].textContent}: expected a whole number from ${low} to ${high}.`;
        values[field.dataset.number || field.dataset.key] = x;
      });
      return { values, bad };
    }

    update() {
      const { values, bad } = this.read(), say = this.querySelector(".me-say");
      let error = bad;
      const name = this.querySelector("#me-pattern").value, pattern = PATTERNS[name];
      if (!error && name === "fixed" && values.summary > values.stride) error = "summary cells c: expected at most the block l.";
      this.querySelector(".me-out").hidden = Boolean(error);
      if (error) { say.textContent = error; return; }
      const n = this.cfg.tokens, tile = Number(this.querySelector("#me-tile").value), i = values.query;
      const keep = dense(pattern.rule(values), n), full = dense(pattern.causal ? (a, b) => b <= a : () => true, n);
      const own = cost(keep, tile, this.cfg.head_dim), all = cost(full, tile, this.cfg.head_dim);
      const reach = layers(keep, pattern.causal), mass = captured(keep, pattern.causal);
      const needle = (i >= NEEDLE || !pattern.causal) && keep[i][NEEDLE];
      const mean = mass.reduce((a, b) => a + b, 0) / n;
      say.textContent = `${percent(own.pairs, all.pairs)} of the pairs, ${percent(own.tiles, all.tiles)} of the tiles. ` +
        (reach === null ? "Some tokens never reach others. " : `All reach all in ${reach} layer${reach === 1 ? "" : "s"}. `) +
        `Query ${i} keeps ${percent(mass[i], 1)} of its softmax` +
        (i >= NEEDLE || !pattern.causal ? ` and ${needle ? "sees" : "misses"} key ${NEEDLE}, which it looks for.` : ".");
      const row = (label, a, b) => `<tr><th scope="row">${label}</th><td>${a}</td><td>${b}</td></tr>`;
      this.querySelector(".me-scroll").innerHTML = `<table><caption>One head, D = ${this.cfg.head_dim}, 2 bytes an element</caption>
        <thead><tr><td></td><th scope="col">pattern</th><th scope="col">full</th></tr></thead><tbody>
        ${row("pairs seen", count(own.pairs), count(all.pairs))}${row("FLOPs of the pairs", count(own.flops), count(all.flops))}
        ${row("tiles read", count(own.tiles), count(all.tiles))}${row("of them whole", count(own.whole), count(all.whole))}
        ${row("FLOPs of the tiles", count(own.tile_flops), count(all.tile_flops))}${row("bytes of K, V read", count(own.bytes), count(all.bytes))}
        ${row("keys of the last query", own.last, all.last)}${row("layers to reach all", reach === null ? "never" : reach, 1)}
        ${row(`softmax kept, query ${i}`, percent(mass[i], 1), "100 %")}${row("mean of all queries", percent(mean, 1), "100 %")}</tbody></table>`;
      this.draw(keep, kinds(keep, tile), tile, i, pattern, own);
    }

    draw(keep, kind, tile, query, pattern, own) {
      const n = keep.length, w = 300 / n, x0 = 24, y0 = 18;
      const box = (x, y, dx, dy) => `M${x0 + x * w} ${y0 + y * w}h${dx * w}v${dy * w}h${-dx * w}z`;
      let seen = "", partial = "", whole = "";
      kind.forEach((row, a) => row.forEach((x, b) => {
        const path = x ? box(b * tile, a * tile, Math.min(tile, n - b * tile), Math.min(tile, n - a * tile)) : "";
        if (x === 1) partial += path; else if (x === 2) whole += path;
      }));
      keep.forEach((row, i) => row.forEach((x, j) => { if (x) seen += box(j + 0.1, i + 0.1, 0.8, 0.8); }));
      const p = weights(query, n, pattern.causal), high = Math.max(...p), base = 392;
      const bars = p.map((x, j) => `<rect class="${keep[query][j] ? "kept" : "lost"}" x="${x0 + (j + 0.1) * w}" y="${base - (44 * x) / high}" width="${0.8 * w}"
        height="${(44 * x) / high}"/>`).join("");
      this.querySelector("svg").innerHTML = `<title>Mask of ${n} queries by ${n} keys, ${pattern.label}: ${own.pairs} pairs seen, ${own.tiles} tiles read,
        ${own.whole} of them whole. Below, the example softmax of query ${query}.</title>
        <text x="${x0}" y="12">keys →</text><text x="4" y="${y0 + 60}" transform="rotate(-90 12 ${y0 + 60})">← queries</text>
        <path class="future" d="${box(0, 0, n, n)}"/><path class="partial" d="${partial}"/><path class="whole" d="${whole}"/><path class="seen" d="${seen}"/>
        <path class="row" d="${box(0, query, n, 1)}"/>
        <text x="${x0}" y="340">softmax of query ${query}: filled kept, hollow lost</text>${bars}`;
    }
  }

  const define = () => { if (!customElements.get("mask-explorer")) customElements.define("mask-explorer", MaskExplorer); };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", define); else define();
})();
