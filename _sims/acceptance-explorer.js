// <acceptance-explorer>: what drafts are worth (alpha, gamma, c), and one accept-or-reject at a time on p against q.
// The arithmetic is in pure functions (window.effattn.acceptanceExplorer); the browser test compares them with
// effattn_lab.linear.speculative*. The element only draws what they return.
(function () {
  "use strict";

  // A {sim} body may replace any of these fields. p: the target's distribution; q: a draft's.
  const DEFAULTS = {
    alpha: 0.7, gamma: 4, c: 0.05, maxGamma: 16, seed: 1,
    tokens: ["the", "a", "this", "my", "one", "no"],
    p: [0.4, 0.25, 0.15, 0.12, 0.05, 0.03],
    drafts: {
      "a fair draft": [0.2, 0.4, 0.1, 0.05, 0.15, 0.1],
      "a good draft": [0.36, 0.28, 0.17, 0.1, 0.05, 0.04],
      "a poor draft": [0.03, 0.05, 0.07, 0.15, 0.3, 0.4],
      "one sure guess": [0, 1, 0, 0, 0, 0],
    },
  };
  const RULES = {
    right: "the right rule", target: "wrong: after a rejection, draw from p", turned: "wrong: accept with q/p",
    always: "wrong: accept everything",
  };

  // Tokens of a round: 1 + a + a^2 + ... + a^gamma.
  function expectedTokens(alpha, gamma) {
    let total = 0;
    for (let i = 0; i <= gamma; i++) total += alpha ** i;
    return total;
  }
  const speedup = (alpha, gamma, c) => expectedTokens(alpha, gamma) / (gamma * c + 1);
  // FLOPs against plain decoding if a draft costs c of a pass in FLOPs too.
  const operationsFactor = (alpha, gamma, c) => (gamma * c + gamma + 1) / expectedTokens(alpha, gamma);
  function optimalGamma(alpha, c, maxGamma) {
    let best = 0;
    for (let g = 1; g <= maxGamma; g++) if (speedup(alpha, g, c) > speedup(alpha, best, c)) best = g;
    return best;
  }

  const sum = (x) => x.reduce((a, b) => a + b, 0);
  const overlap = (p, q) => sum(p.map((x, i) => Math.min(x, q[i])));
  function residual(p, q) {
    const over = p.map((x, i) => Math.max(0, x - q[i])), total = sum(over);
    return total > 0 ? over.map((x) => x / total) : p.slice();
  }
  // The first token whose cumulative probability exceeds u; never one of probability 0.
  function sample(probs, u) {
    let total = 0, last = 0;
    for (let i = 0; i < probs.length; i++) {
      total += probs[i];
      if (probs[i] > 0) { last = i; if (u < total) return i; }
    }
    return last;
  }
  const chance = (p, q, rule) => rule === "always" ? 1 : rule === "turned" ? (p > 0 ? Math.min(1, q / p) : 1) : Math.min(1, p / q);
  const fallback = (p, q, rule) => rule === "target" ? p : residual(p, q);

  // One draft, three random numbers: what was drafted, whether it stayed, what came out.
  function round(p, q, u, rule) {
    const draft = sample(q, u[0]), a = chance(p[draft], q[draft], rule), accepted = u[1] < a;
    return { draft, chance: a, u: u[1], accepted, token: accepted ? draft : sample(fallback(p, q, rule), u[2]) };
  }
  // Distribution of the token that comes out, in closed form.
  function emitted(p, q, rule) {
    const kept = p.map((x, i) => q[i] > 0 ? q[i] * chance(x, q[i], rule) : 0), rest = fallback(p, q, rule), left = 1 - sum(kept);
    return kept.map((x, i) => x + left * rest[i]);
  }
  // Reproducible uniform numbers (mulberry32).
  function random(seed) {
    let a = seed >>> 0;
    return () => {
      a = (a + 0x6d2b79f5) | 0;
      let t = Math.imul(a ^ (a >>> 15), 1 | a);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  window.effattn = window.effattn || {};
  window.effattn.acceptanceExplorer = { DEFAULTS, RULES, expectedTokens, speedup, operationsFactor, optimalGamma, overlap, residual,
    sample, round, emitted, random };

  const CSS = `
  acceptance-explorer { display:block; border:1px solid var(--pst-color-border,#999); border-radius:6px; padding:.8rem; margin:1rem 0;
    color:var(--pst-color-text-base,#222); font-size:.92rem }
  acceptance-explorer .ae-bar { display:flex; flex-wrap:wrap; gap:.5rem 1rem; align-items:center; margin-bottom:.6rem }
  acceptance-explorer .ae-slide { flex:1 1 170px; min-width:0 }
  acceptance-explorer .ae-slide input { width:100%; min-height:1.8rem; accent-color:var(--pst-color-primary,#0072b2) }
  acceptance-explorer h4 { font-size:1rem; margin:.2rem 0 .5rem; color:inherit }
  acceptance-explorer button, acceptance-explorer select { font:inherit; color:inherit; background:var(--pst-color-surface,#eee);
    border:1px solid var(--pst-color-text-muted,#666); border-radius:4px; padding:.25rem .7rem; min-height:2.2rem; max-width:100% }
  acceptance-explorer :is(button,select,input):focus-visible { outline:3px solid var(--pst-color-primary,#0072b2); outline-offset:2px }
  acceptance-explorer .ae-stage { display:flex; flex-wrap:wrap; gap:.4rem 1.2rem; align-items:flex-start }
  acceptance-explorer svg { flex:1 1 270px; max-width:430px; width:100%; height:auto }
  acceptance-explorer .ae-side { flex:1 1 230px; min-width:0 }
  acceptance-explorer .ae-say { margin:0 0 .5rem; min-height:3em }
  acceptance-explorer table { color:inherit; border-collapse:collapse; width:100%; margin:0 0 .6rem; font-variant-numeric:tabular-nums; font-size:.9rem }
  acceptance-explorer :is(th,td) { padding:.15rem .3rem; text-align:right; border-bottom:1px solid var(--pst-color-border,#ccc) }
  acceptance-explorer th[scope=row] { text-align:left; font-weight:400 }
  acceptance-explorer hr { border:0; border-top:1px solid var(--pst-color-border,#ccc); margin:.8rem 0 }
  acceptance-explorer svg text { font-size:11px; fill:currentColor }
  acceptance-explorer svg .axis { stroke:var(--pst-color-text-muted,#777); stroke-width:.7 }
  acceptance-explorer svg .one { stroke:var(--pst-color-text-muted,#777); stroke-dasharray:4 3 }`;

  const num = (x, d) => x.toFixed(d).replace("-", "−");
  const percent = (x) => `${(100 * x).toFixed(1)} %`;

  class AcceptanceExplorer extends HTMLElement {
    connectedCallback() {
      if (this.ready) return;
      this.ready = true;
      const body = this.querySelector('script[type="application/json"]');
      this.cfg = Object.assign({}, DEFAULTS, body && body.textContent.trim() ? JSON.parse(body.textContent) : {});
      if (!document.getElementById("acceptance-explorer-css")) {
        const style = document.createElement("style");
        style.id = "acceptance-explorer-css"; style.textContent = CSS; document.head.append(style);
      }
      const { alpha, gamma, c, maxGamma, drafts } = this.cfg;
      const slide = (name, text, value, max, step) => `<label class="ae-slide">${text} <output data-of="${name}"></output>
        <input type="range" data-set="${name}" min="0" max="${max}" step="${step}" value="${value}"></label>`;
      const option = (value, text) => `<option value="${value}">${text}</option>`;
      const shell = document.createElement("div");
      shell.innerHTML = `
        <h4>What drafts are worth</h4>
        <div class="ae-bar">${slide("alpha", "acceptance α =", alpha, 0.99, 0.01)}${slide("gamma", "drafts γ =", gamma, maxGamma, 1)}
          ${slide("c", "cost of a draft c =", c, 0.5, 0.01)}</div>
        <div class="ae-stage"><svg class="ae-curve" viewBox="0 0 340 210" role="img"></svg>
          <div class="ae-side"><p class="ae-say ae-worth" role="status" aria-live="polite"></p>
          <table><tbody class="ae-numbers"></tbody></table></div></div>
        <hr><h4>One place, accepted or not</h4>
        <div class="ae-bar"><label>draft <select data-set="draft">${Object.keys(drafts).map((d) => option(d, d)).join("")}</select></label>
          <label>rule <select data-set="rule">${Object.entries(RULES).map(([k, v]) => option(k, v)).join("")}</select></label></div>
        <div class="ae-bar" role="group" aria-label="Draw tokens"><button type="button" data-do="1">Draw one</button>
          <button type="button" data-do="1000">Draw 1000</button><button type="button" data-do="reset">Start again</button>
          <button type="button" data-do="alpha">Use this β as α</button></div>
        <div class="ae-stage"><svg class="ae-bars" viewBox="0 0 340 240" role="img"></svg>
          <div class="ae-side"><p class="ae-say ae-last" role="status" aria-live="polite"></p>
          <table><tbody class="ae-tally"></tbody></table></div></div>`;
      this.append(shell);
      this.addEventListener("input", (e) => {
        const name = e.target.dataset.set;
        if (!name) return;
        if (name === "draft" || name === "rule") this.restart(); else this.worth();
      });
      this.addEventListener("click", (e) => { const b = e.target.closest("button[data-do]"); if (b) this.act(b.dataset.do); });
      this.worth();
      this.restart();
    }

    get(name) { return this.querySelector(`[data-set="${name}"]`).value; }

    act(what) {
      if (what === "reset") return this.restart();
      if (what === "alpha") {
        // Not above the slider's own end: with p = q the acceptance is 1.
        this.querySelector('[data-set="alpha"]').value = Math.min(0.99, overlap(this.cfg.p, this.q));
        return this.worth();
      }
      for (let i = 0; i < Number(what); i++) {
        this.last = round(this.cfg.p, this.q, [this.uniform(), this.uniform(), this.uniform()], this.rule);
        this.counts[this.last.token] += 1;
        this.accepted += this.last.accepted;
        this.n += 1;
      }
      this.draw();
    }

    restart() {
      this.q = this.cfg.drafts[this.get("draft")];
      this.rule = this.get("rule");
      this.counts = this.cfg.p.map(() => 0);
      this.n = this.accepted = 0;
      this.last = null;
      this.uniform = random(this.cfg.seed);
      this.draw();
    }

    worth() {
      const alpha = Number(this.get("alpha")), gamma = Number(this.get("gamma")), c = Number(this.get("c")), top = this.cfg.maxGamma;
      const best = optimalGamma(alpha, c, top), now = speedup(alpha, gamma, c), most = speedup(alpha, best, c);
      for (const [name, text] of [["alpha", num(alpha, 2)], ["gamma", gamma], ["c", num(c, 2)]]) this.querySelector(`[data-of="${name}"]`).textContent = text;
      this.querySelector(".ae-worth").textContent =
        `A round of ${gamma} draft${gamma === 1 ? "" : "s"} yields ${num(expectedTokens(alpha, gamma), 2)} tokens on average and takes ` +
        `${num(gamma * c + 1, 2)} passes' time: ${num(now, 2)} times as fast. ` +
        (best === 0 ? "No number of drafts pays: α is not above c." : `Best: γ = ${best}${best === top ? " or more" : ""}, ${num(most, 2)} times.`);
      const row = (name, value) => `<tr><th scope="row">${name}</th><td>${value}</td></tr>`;
      this.querySelector(".ae-numbers").innerHTML = row("tokens per pass of the target", num(expectedTokens(alpha, gamma), 2)) +
        row("at most (γ + 1)", gamma + 1) + row("speed-up", num(now, 2)) + row("best γ", best) + row("speed-up there", num(most, 2)) +
        row("FLOPs against plain decoding", `${num(operationsFactor(alpha, gamma, c), 2)} ×`);
      this.curve(alpha, gamma, c, best);
    }

    curve(alpha, gamma, c, best) {
      const top = this.cfg.maxGamma, values = Array.from({ length: top + 1 }, (_, g) => speedup(alpha, g, c));
      const ceiling = Math.max(2, Math.ceil(Math.max(...values))), x0 = 34, y0 = 176, w = 296, h = 150;
      const X = (g) => x0 + (g / top) * w, Y = (s) => y0 - (s / ceiling) * h;
      let svg = `<title>Speed-up against the number of drafts for α = ${num(alpha, 2)}, c = ${num(c, 2)}: ${num(values[gamma], 2)} at γ = ${gamma}, ` +
        `most ${num(values[best], 2)} at γ = ${best}.</title><text x="4" y="14">speed-up</text>`;
      const step = ceiling > 8 ? 4 : ceiling > 4 ? 2 : 1;
      for (let s = 0; s <= ceiling; s += step) svg += `<line class="axis" x1="${x0}" x2="${x0 + w}" y1="${Y(s)}" y2="${Y(s)}" opacity=".4"/><text x="${x0 - 6}" y="${Y(s) + 4}" text-anchor="end">${s}</text>`;
      for (let g = 0; g <= top; g += 4) svg += `<text x="${X(g)}" y="${y0 + 15}" text-anchor="middle">${g}</text>`;
      svg += `<text x="${x0 + w / 2}" y="206" text-anchor="middle">drafts γ</text><line class="one" x1="${x0}" x2="${x0 + w}" y1="${Y(1)}" y2="${Y(1)}"/>`;
      svg += `<path d="M${values.map((s, g) => `${X(g)} ${Y(s)}`).join(" L")}" fill="none" stroke="#0072B2" stroke-width="2.2"/>`;
      values.forEach((s, g) => { svg += `<circle cx="${X(g)}" cy="${Y(s)}" r="2.4" fill="#0072B2"/>`; });
      svg += `<path d="M${X(best)} ${Y(values[best]) - 7} l7 7 l-7 7 l-7 -7 z" fill="none" stroke="#D55E00" stroke-width="2.5"/>`;
      svg += `<circle cx="${X(gamma)}" cy="${Y(values[gamma])}" r="5" fill="#0072B2" stroke="currentColor" stroke-width="1.5"/>`;
      svg += `<text x="${x0 + w}" y="14" text-anchor="end">● chosen γ  ◇ best γ  – – no gain</text>`;
      this.querySelector(".ae-curve").innerHTML = svg;
    }

    draw() {
      const { p, tokens } = this.cfg, { q, rule, last, n } = this, out = emitted(p, q, rule), beta = sum(p.map((x, i) => q[i] > 0 ? q[i] * chance(x, q[i], rule) : 0));
      const say = this.querySelector(".ae-last");
      if (!last) say.textContent = "Nothing drawn yet. The draft proposes a token from q; a random number u below p/q accepts it.";
      else say.textContent = `Drafted “${tokens[last.draft]}”: accepted with probability ${num(last.chance, 2)}, u = ${num(last.u, 2)}, so ` +
        (last.accepted ? "it stays." : `rejected; “${tokens[last.token]}” comes from ${rule === "target" ? "p" : "the residual"} instead.`);
      const far = Math.max(...out.map((x, i) => Math.abs(x - p[i])));
      const row = (name, value) => `<tr><th scope="row">${name}</th><td>${value}</td></tr>`;
      this.querySelector(".ae-tally").innerHTML = row("probability of acceptance", percent(beta)) + row("tokens drawn", n) +
        row("accepted", n ? percent(this.accepted / n) : "–") +
        row("largest error of the rule itself", far < 1e-12 ? "none: exact" : percent(far));
      const width = 300 / p.length, top = Math.max(...p, ...q, ...out, ...(n ? this.counts.map((x) => x / n) : [])), y0 = 190, H = (x) => (x / top) * 150;
      let svg = `<title>Bars of p and q for ${p.length} tokens; marks show how often each token came out.</title><defs><pattern id="ae-hatch" width="5" height="5"
        patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="2" height="5" fill="#E69F00"/></pattern></defs>
        <text x="4" y="14">probability (highest ${num(top, 2)})</text>`;
      p.forEach((x, i) => {
        const at = 24 + i * width, bar = width * 0.36;
        const fat = last && last.token === i ? 2.6 : 0.8;
        svg += `<rect x="${at}" y="${y0 - H(x)}" width="${bar}" height="${H(x)}" fill="#0072B2" stroke="currentColor" stroke-width="${fat}"/>` +
          `<rect x="${at + bar}" y="${y0 - H(q[i])}" width="${bar}" height="${H(q[i])}" fill="url(#ae-hatch)" stroke="#B07300" stroke-width="1"/>` +
          `<line x1="${at - 3}" x2="${at + bar + 3}" y1="${y0 - H(out[i])}" y2="${y0 - H(out[i])}" stroke="#D55E00" stroke-width="2.5"/>` +
          `<text x="${at + bar}" y="${y0 + 15}" text-anchor="middle">${tokens[i]}</text>`;
        if (n) svg += `<circle cx="${at + bar / 2}" cy="${y0 - H(this.counts[i] / n)}" r="4" fill="none" stroke="currentColor" stroke-width="1.8"/>`;
      });
      svg += `<line class="axis" x1="18" x2="330" y1="${y0}" y2="${y0}"/>
        <rect x="20" y="219" width="11" height="11" fill="#0072B2"/><text x="36" y="229">p target</text>
        <rect x="92" y="219" width="11" height="11" fill="url(#ae-hatch)" stroke="#B07300"/><text x="108" y="229">q draft</text>
        <line x1="158" x2="174" y1="225" y2="225" stroke="#D55E00" stroke-width="2.5"/><text x="179" y="229">rule gives</text>
        <circle cx="246" cy="225" r="4" fill="none" stroke="currentColor" stroke-width="1.8"/><text x="255" y="229">drawn so far</text>`;
      this.querySelector(".ae-bars").innerHTML = svg;
    }
  }

  const define = () => { if (!customElements.get("acceptance-explorer")) customElements.define("acceptance-explorer", AcceptanceExplorer); };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", define); else define();
})();
