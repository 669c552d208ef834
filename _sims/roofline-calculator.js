// <roofline-calculator>: the least time of one forward step of a decoder on a GPU, and why.
// estimate() repeats effattn_lab.foundations.presets.estimate; a browser test holds the two together.
// Models and GPUs arrive as JSON in the element, written by Python when the book is built.
(function () {
  "use strict";

  // Weights that multiply (one layer, output layer), that a step reads, and that must be stored.
  function params(m) {
    const layer = 2 * m.width * m.head_dim * (m.num_heads + m.num_kv_heads) + 3 * m.width * m.ffn_width;
    const head = m.vocab_size * m.width;
    const read = m.num_layers * layer + head;
    return { layer, head, read, total: read + (m.tied ? 0 : head) + (2 * m.num_layers + 1) * m.width };
  }

  function part(flops, nbytes, gpu) {
    const compute = flops / (gpu.peak_tflops * 1e12), memory = nbytes / (gpu.bandwidth_gbs * 1e9);
    return { flops, nbytes, intensity: flops / nbytes, time_s: Math.max(compute, memory),
      bound: compute >= memory ? "compute" : "memory" };
  }

  const ridge = (gpu) => (gpu.peak_tflops * 1e12) / (gpu.bandwidth_gbs * 1e9);

  // o: {phase, seqlen, batch, weight_itemsize, cache_itemsize, kernel}
  function estimate(model, gpu, o) {
    const p = params(model), prefill = o.phase === "prefill", N = o.seqlen, B = o.batch;
    const flash = o.kernel !== "naive", Nq = prefill ? N : 1, tokens = B * Nq;
    const dense = part(2 * (tokens * model.num_layers * p.layer + B * p.head), p.read * o.weight_itemsize, gpu);
    const pairs = prefill && flash ? (N * (N + 1)) / 2 : Nq * N;
    const qkvo = B * model.head_dim * (2 * model.num_heads * Nq + 2 * model.num_kv_heads * N);
    let moved = qkvo * o.cache_itemsize;
    if (prefill) moved += B * model.num_heads * N * (flash ? 4 : 4 * N * o.cache_itemsize);
    const flops = 4 * B * model.num_heads * model.head_dim * pairs;
    const attention = part(model.num_layers * flops, model.num_layers * moved, gpu);
    const time_s = dense.time_s + attention.time_s, weights_bytes = p.total * o.weight_itemsize;
    const kv_cache_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * N * B * o.cache_itemsize;
    return { dense, attention, time_s, tokens_per_s: tokens / time_s, weights_bytes, kv_cache_bytes,
      fits: weights_bytes + kv_cache_bytes <= gpu.memory_gb * 1e9 };
  }

  // Three significant digits with a decimal prefix: si(1.61e10, "B") is "16.1 GB".
  function si(x, unit) {
    if (!(x > 0) || !isFinite(x)) return "0 " + unit;
    const steps = [[1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""], [1e-3, "m"], [1e-6, "µ"]];
    const [size, prefix] = steps.find(([s]) => x >= s * 0.9995) || [1e-9, "n"];
    return num(x / size) + " " + prefix + unit;
  }
  function num(x) {
    if (x >= 9999.5) return Math.round(x).toLocaleString("en");
    return x >= 99.95 ? x.toFixed(0) : x >= 9.995 ? x.toFixed(1) : x.toFixed(2);
  }

  window.effattn = window.effattn || {};
  window.effattn.rooflineCalculator = { params, estimate, ridge, si };

  const SHAPE = [["num_layers", "Layers"], ["width", "Width M"], ["num_heads", "Query heads"], ["num_kv_heads", "KV heads"],
    ["head_dim", "Head dim D"], ["ffn_width", "MLP width"], ["vocab_size", "Vocabulary"]];

  const CSS = `
  roofline-calculator { display:block; border:1px solid var(--pst-color-border,#999); border-radius:6px; padding:.9rem; margin:1rem 0;
    color:var(--pst-color-text-base,#222); font-size:.95rem }
  roofline-calculator fieldset { border:0; padding:0; margin:0 0 .7rem; min-width:0; display:grid; gap:.5rem .8rem;
    grid-template-columns:repeat(auto-fit,minmax(128px,1fr)) }
  roofline-calculator legend { font-weight:600; font-size:1em; margin:0; padding:0; float:none; width:100%; grid-column:1/-1 }
  roofline-calculator [hidden] { display:none !important }
  roofline-calculator label { display:block; font-size:.88em; margin:0 0 .15rem; color:var(--pst-color-text-base,#222) }
  roofline-calculator :is(input,select) { font:inherit; font-size:1rem; color:inherit; background:var(--pst-color-surface,#f4f4f4); width:100%;
    min-height:2.3rem; border:1px solid var(--pst-color-text-muted,#666); border-radius:4px; padding:.15rem .4rem; box-sizing:border-box }
  roofline-calculator :is(input,select,.rc-scroll):focus-visible { outline:3px solid var(--pst-color-primary,#0072b2); outline-offset:1px }
  roofline-calculator input[aria-invalid=true] { border:2px solid var(--pst-color-danger,#b00020) }
  roofline-calculator .rc-say { margin:.2rem 0 .7rem; font-size:1.02em }
  roofline-calculator .rc-out { display:flex; flex-wrap:wrap; gap:1rem; align-items:flex-start }
  roofline-calculator svg { flex:1 1 300px; max-width:480px; width:100%; height:auto }
  roofline-calculator .rc-scroll { flex:1 1 250px; min-width:0; overflow-x:auto }
  roofline-calculator table { border-collapse:collapse; width:100%; margin:0 0 .6rem; font-variant-numeric:tabular-nums; font-size:.92em }
  roofline-calculator :is(th,td) { padding:.25rem .4rem; text-align:right; border-bottom:1px solid var(--pst-color-border,#ccc); white-space:nowrap }
  roofline-calculator th[scope=row] { text-align:left }
  roofline-calculator caption { caption-side:top; text-align:left; color:inherit; font-weight:600; padding:0 0 .2rem }
  roofline-calculator svg text { font-size:12px; fill:var(--pst-color-text-base,#222) }
  roofline-calculator svg .axis { stroke:var(--pst-color-border,#bbb); stroke-width:1 }
  roofline-calculator svg .roof { stroke:var(--pst-color-text-base,#222); stroke-width:2.5; fill:none }
  roofline-calculator svg .ridge { stroke:var(--pst-color-text-muted,#666); stroke-dasharray:4 3 }
  roofline-calculator svg .mark { fill:var(--pst-color-primary,#0072b2); stroke:var(--pst-color-background,#fff); stroke-width:1.5 }`;

  const option = (value, text) => `<option value="${value}">${text}</option>`;
  const field = (key, label, control) => `<div><label for="rc-${key}">${label}</label>${control}</div>`;
  const select = (key, label, options) => field(key, label, `<select id="rc-${key}" data-key="${key}">${options}</select>`);
  const number = (key, label, value) => field(key, label,
    `<input type="number" inputmode="numeric" min="1" step="1" value="${value}" id="rc-${key}" data-key="${key}">`);

  class RooflineCalculator extends HTMLElement {
    connectedCallback() {
      if (this.ready) return;
      this.ready = true;
      this.data = JSON.parse(this.querySelector('script[type="application/json"]').textContent);
      if (!document.getElementById("roofline-calculator-css")) {
        const style = document.createElement("style");
        style.id = "roofline-calculator-css"; style.textContent = CSS; document.head.append(style);
      }
      const { models, gpus } = this.data, start = Math.max(0, gpus.findIndex((g) => g.name.startsWith("H100")));
      this.innerHTML = `<fieldset><legend>Roofline calculator</legend>
        ${select("model", "Model", models.map((m, i) => option(i, m.name)).join("") + option("custom", "Your own…"))}
        ${select("gpu", "GPU", gpus.map((g, i) => option(i, g.name)).join(""))}
        ${select("phase", "Phase", option("decode", "decode") + option("prefill", "prefill"))}
        ${number("seqlen", "Length N (tokens)", 8192)}${number("batch", "Sequences B", 1)}
        ${select("weight_itemsize", "Weights", option(2, "16 bits") + option(1, "8 bits") + option(0.5, "4 bits") + option(4, "32 bits"))}
        ${select("cache_itemsize", "KV cache", option(2, "16 bits") + option(1, "8 bits") + option(4, "32 bits"))}
        ${select("kernel", "Prefill attention", option("flash", "flash") + option("naive", "naive, 3 kernels"))}</fieldset>
        <fieldset class="rc-custom" hidden><legend>Your own model</legend>
        ${SHAPE.map(([key, label]) => number(key, label, models[0][key])).join("")}
        ${select("tied", "Embedding tied?", option("", "no") + option("1", "yes"))}</fieldset>
        <p class="rc-say" role="status" aria-live="polite"></p>
        <div class="rc-out"><svg viewBox="0 0 360 250" role="img"></svg>
        <div class="rc-scroll" tabindex="0" role="region" aria-label="Table of the step's cost"></div></div>`;
      this.querySelector('[data-key="gpu"]').value = String(start);
      this.addEventListener("input", () => this.update());
      this.update();
    }

    read() {
      const value = {};
      let bad = null;
      this.querySelectorAll("[data-key]").forEach((field) => {
        if (field.closest("[hidden]")) return;
        const isNumber = field.type === "number", x = Number(field.value);
        const ok = !isNumber || (Number.isInteger(x) && x >= 1 && x <= 1e9);
        field.setAttribute("aria-invalid", String(!ok));
        if (!ok) bad = bad || field.labels[0].textContent;
        value[field.dataset.key] = isNumber || field.dataset.key.endsWith("itemsize") ? x : field.value;
      });
      return { value, bad };
    }

    update() {
      const custom = this.querySelector('[data-key="model"]').value === "custom";
      this.querySelector(".rc-custom").hidden = !custom;
      this.querySelector('[data-key="kernel"]').disabled = this.querySelector('[data-key="phase"]').value === "decode";
      const { value, bad } = this.read(), say = this.querySelector(".rc-say");
      const uneven = custom && !bad && value.num_heads % value.num_kv_heads !== 0;
      this.querySelector(".rc-out").hidden = Boolean(bad || uneven);
      if (bad) { say.textContent = `${bad}: expected a whole number from 1 to 1,000,000,000.`; return; }
      if (uneven) { say.textContent = "KV heads must divide the query heads."; return; }
      const model = custom ? Object.assign({}, value, { name: "Your model", tied: value.tied === "1" }) : this.data.models[Number(value.model)];
      const gpu = this.data.gpus[Number(value.gpu)], e = estimate(model, gpu, value);
      const wait = ["dense", "attention"].reduce((t, key) => t + (e[key].bound === "memory" ? e[key].time_s : 0), 0) / e.time_s;
      const need = e.weights_bytes + e.kv_cache_bytes;
      say.textContent = `${model.name} on ${gpu.name}, ${value.phase} at N = ${value.seqlen.toLocaleString("en")}, B = ${value.batch.toLocaleString("en")}: ` +
        `at least ${si(e.time_s, "s")}${value.phase === "decode" ? " a step" : ""}, at most ${num(e.tokens_per_s)} tokens/s. ` +
        `${Math.round(100 * wait)} % of that time waits for memory. Weights and cache take ${si(need, "B")} of ${gpu.memory_gb} GB: ` +
        (e.fits ? "they fit." : "they do not fit.");
      const row = (name, show) => `<tr><th scope="row">${name}</th><td>${show(e.dense)}</td><td>${show(e.attention)}</td></tr>`;
      this.querySelector(".rc-scroll").innerHTML = `<table><caption>Work of the step</caption><thead><tr><td></td>
        <th scope="col">Dense ●</th><th scope="col">Attention ◆</th></tr></thead><tbody>
        ${row("FLOPs", (x) => si(x.flops, "FLOP"))}${row("Bytes moved", (x) => si(x.nbytes, "B"))}${row("FLOP/byte", (x) => num(x.intensity))}
        ${row("Least time", (x) => si(x.time_s, "s"))}${row("Bound by", (x) => x.bound)}</tbody></table>
        <table><caption>Memory</caption><tbody><tr><th scope="row">Weights</th><td>${si(e.weights_bytes, "B")}</td></tr>
        <tr><th scope="row">KV cache</th><td>${si(e.kv_cache_bytes, "B")} = ${num(e.kv_cache_bytes / 2 ** 30)} GiB</td></tr>
        <tr><th scope="row">GPU</th><td>${gpu.memory_gb} GB</td></tr></tbody></table>`;
      this.draw(gpu, e);
    }

    draw(gpu, e) {
      const x0 = 46, x1 = 350, y0 = 214, y1 = 22, lx = [-2, 5], ly = [-2, 4], peak = gpu.peak_tflops;
      const X = (v) => x0 + ((Math.log10(v) - lx[0]) / (lx[1] - lx[0])) * (x1 - x0);
      const Y = (v) => y0 - ((Math.log10(v) - ly[0]) / (ly[1] - ly[0])) * (y0 - y1);
      const at = (v) => Math.min(peak, v * gpu.bandwidth_gbs / 1e3), clip = (v) => Math.min(Math.max(v, 10 ** lx[0]), 10 ** lx[1]);
      const label = { "-2": "0.01", 0: "1", 2: "100", 4: "10⁴", 5: "10⁵" };
      let s = `<title>Roofline of ${gpu.name}: dense layers at ${num(e.dense.intensity)} FLOP per byte (${e.dense.bound}), ` +
        `attention at ${num(e.attention.intensity)} (${e.attention.bound}); ridge at ${num(ridge(gpu))}.</title>`;
      for (const t of [-2, 0, 2, 4]) s += `<line class="axis" x1="${x0}" x2="${x1}" y1="${Y(10 ** t)}" y2="${Y(10 ** t)}"/>` +
        `<text x="${x0 - 5}" y="${Y(10 ** t) + 4}" text-anchor="end">${label[t]}</text>`;
      for (const t of [-2, 0, 2, 4]) s += `<line class="axis" x1="${X(10 ** t)}" x2="${X(10 ** t)}" y1="${y0}" y2="${y1}"/>` +
        `<text x="${X(10 ** t)}" y="${y0 + 16}" text-anchor="middle">${label[t]}</text>`;
      s += `<text x="${(x0 + x1) / 2}" y="246" text-anchor="middle">intensity, FLOP/byte</text><text x="4" y="12">attainable TFLOP/s</text>`;
      const r = ridge(gpu);
      s += `<line class="ridge" x1="${X(r)}" x2="${X(r)}" y1="${y0}" y2="${Y(peak)}"/>` +
        `<text x="${X(r) - 5}" y="${y0 - 6}" text-anchor="end">ridge ${num(r)}</text>` +
        `<path class="roof" d="M${X(10 ** lx[0])} ${Y(at(10 ** lx[0]))} L${X(r)} ${Y(peak)} L${x1} ${Y(peak)}"/>`;
      const mark = (part, name, diamond) => {
        const v = clip(part.intensity), x = X(v), y = Y(at(v)), left = x > x1 - 70;
        const below = diamond ? 20 : -10;  // labels on opposite sides of the roof, so that equal intensities stay readable
        return (diamond ? `<path class="mark" d="M${x} ${y - 8} l8 8 l-8 8 l-8 -8 z"/>` : `<circle class="mark" cx="${x}" cy="${y}" r="6"/>`) +
          `<text x="${x + (left ? 6 : diamond ? 6 : -4)}" y="${y + below}" text-anchor="${left || !diamond ? "end" : "start"}">${name}</text>`;
      };
      this.querySelector("svg").innerHTML = s + mark(e.dense, "dense", false) + mark(e.attention, "attention", true);
    }
  }

  const start = () => customElements.get("roofline-calculator") || customElements.define("roofline-calculator", RooflineCalculator);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
