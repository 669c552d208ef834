// What the steppers share: frames of a small computation, walked through by buttons, by keys or by itself, with a
// picture of the pairs of queries and keys on one side and words and tables on the other. Not a simulator: a script
// that builds on it says "needs: stepper" in its first lines, which loads this one before it.
(function () {
  "use strict";

  const dot = (a, b) => a.reduce((sum, x, i) => sum + x * b[i], 0);

  // Largest absolute difference of two [n][D] tables.
  const maxDiff = (a, b) => Math.max(...a.map((row, i) => Math.max(...row.map((x, c) => Math.abs(x - b[i][c])))));

  // A number as the tables show it; null is "not there yet".
  const fmt = (x, digits = 2) => x === null ? "–" : x === -Infinity ? "−∞" : x.toFixed(digits).replace("-", "−");

  const CSS = (tag, lines) => `
  ${tag} { display:block; border:1px solid var(--pst-color-border,#999); border-radius:6px; padding:.8rem; margin:1rem 0;
    color:var(--pst-color-text-base,#222); font-size:.92rem }
  ${tag} .st-bar { display:flex; flex-wrap:wrap; gap:.5rem .9rem; align-items:center; margin-bottom:.6rem }
  ${tag} button, ${tag} select { font:inherit; color:inherit; background:var(--pst-color-surface,#eee);
    border:1px solid var(--pst-color-text-muted,#666); border-radius:4px; padding:.25rem .7rem; min-height:2.2rem; max-width:100% }
  ${tag} button:disabled { opacity:.5 }
  ${tag} :is(button,select,input,.st-stage):focus-visible { outline:3px solid var(--pst-color-primary,#0072b2); outline-offset:2px }
  ${tag} .st-stage { display:flex; flex-wrap:wrap; gap:1rem; align-items:flex-start }
  ${tag} svg { flex:1 1 240px; max-width:340px; width:100%; height:auto }
  ${tag} .st-side { flex:1 1 250px; min-width:0 }
  ${tag} .st-say { min-height:${1.5 * lines}em; margin:0 0 .5rem }
  ${tag} table { color:inherit; border-collapse:collapse; width:100%; margin:0 0 .6rem; font-variant-numeric:tabular-nums; font-size:.88rem }
  ${tag} th, ${tag} td { padding:.12rem .3rem; text-align:right; border-bottom:1px solid var(--pst-color-border,#ccc) }
  ${tag} caption { text-align:left; caption-side:top; font-weight:600; color:inherit; padding:0 0 .2rem }
  ${tag} svg text { font-size:9px; fill:currentColor }
  ${tag} svg .on { fill:#fff } ${tag} svg .lab { font-size:10px }`;

  // A subclass has:
  //   static defaults, static lines (of words under the picture), static group and stage (labels for a screen reader);
  //   controls() -> HTML of fields with data-set="name of a setting"; compute() -> {run: {frames, …}, truth};
  //   say(frame) -> words, frame null when all is done; picture(frame) -> SVG; describe() -> what the picture shows;
  //   tables(frame, done) -> HTML, for the last frame when done.
  class Stepper extends HTMLElement {
    connectedCallback() {
      if (this.ready) return;
      this.ready = true;
      const kind = this.constructor, tag = this.localName;
      const body = this.querySelector('script[type="application/json"]');
      this.cfg = Object.assign({}, kind.defaults, body && body.textContent.trim() ? JSON.parse(body.textContent) : {});
      if (!document.getElementById(`${tag}-css`)) {
        const style = document.createElement("style");
        style.id = `${tag}-css`; style.textContent = CSS(tag, kind.lines); document.head.append(style);
      }
      const shell = document.createElement("div");
      shell.innerHTML = `
        <div class="st-bar">${this.controls()}</div>
        <div class="st-bar" role="group" aria-label="${kind.group}">
          <button type="button" data-do="reset">Start</button><button type="button" data-do="back">Back</button>
          <button type="button" data-do="step">Step</button><button type="button" data-do="play" aria-pressed="false">Play</button>
          <button type="button" data-do="end">End</button><span class="st-count"></span>
        </div>
        <div class="st-stage" tabindex="0" role="group" aria-label="${kind.stage}: left and right arrows step, space plays">
          <svg viewBox="0 0 262 262" role="img"></svg>
          <div class="st-side"><p class="st-say" aria-live="polite"></p><div class="st-tables"></div></div>
        </div>`;
      this.append(shell);
      this.addEventListener("click", (e) => { const b = e.target.closest("button[data-do]"); if (b) this.act(b.dataset.do); });
      this.addEventListener("change", (e) => {
        const name = e.target.dataset.set;
        if (!name) return;
        this.cfg[name] = e.target.type === "checkbox" ? e.target.checked : Number(e.target.value);
        this.restart();
      });
      this.querySelector(".st-stage").addEventListener("keydown", (e) => {
        const what = { ArrowRight: "step", ArrowLeft: "back", Home: "reset", End: "end", " ": "play" }[e.key];
        if (what) { e.preventDefault(); this.act(what); }
      });
      this.restart();
    }

    disconnectedCallback() { this.stop(); }

    restart() {
      this.stop();
      Object.assign(this, this.compute());
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

    draw() {
      const frames = this.run.frames, frame = this.at < frames.length ? frames[this.at] : null;
      this.querySelector(".st-count").textContent = `step ${this.at} of ${frames.length}`;
      this.querySelector('[data-do="back"]').disabled = this.at === 0;
      this.querySelector('[data-do="step"]').disabled = !frame;
      const play = this.querySelector('[data-do="play"]');
      play.textContent = this.timer ? "Pause" : "Play"; play.setAttribute("aria-pressed", String(Boolean(this.timer)));
      const say = this.querySelector(".st-say"), words = this.say(frame);
      if (say.textContent !== words) say.textContent = words;
      const svg = this.querySelector("svg");
      svg.innerHTML = this.backdrop() + this.picture(frame);
      svg.setAttribute("aria-label", `${this.describe()} ${words}`);
      this.querySelector(".st-tables").innerHTML = this.tables(frame || frames[frames.length - 1], !frame);
    }

    backdrop() {
      return `<defs><pattern id="${this.localName}-hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
        <rect width="2" height="6" fill="var(--pst-color-text-muted,#777)" opacity=".45"/></pattern></defs>
        <text class="lab" x="142" y="9" text-anchor="middle">keys →</text>
        <text class="lab" x="9" y="142" text-anchor="middle" transform="rotate(-90 9 142)">← queries</text>`;
    }

    // One pair, row i and column j, cells of width w; hidden ones are hatched, `now` is filled, `past` is grey.
    cell(i, j, w, { hidden, now, past, text }) {
      const x = 20 + j * w, y = 16 + i * w;
      const fill = hidden ? `url(#${this.localName}-hatch)` : now ? "#0072B2" : past ? "var(--pst-color-border,#ccc)" : "none";
      const box = `<rect x="${x}" y="${y}" width="${w - 1}" height="${w - 1}" fill="${fill}" stroke="var(--pst-color-text-muted,#777)" stroke-width=".4"/>`;
      return text ? box + `<text class="${now && !hidden ? "on" : ""}" x="${x + w / 2}" y="${y + w / 2 + 3}" text-anchor="middle">${text}</text>` : box;
    }
  }

  window.effattn = window.effattn || {};
  window.effattn.stepper = { Stepper, dot, maxDiff, fmt };
})();
