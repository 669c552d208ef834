// <practice-trainer>: one card at a time. The cards are in the page already, hidden; this shows, reveals, rates and keeps.
// Rules are in practice-core.js, storage in practice-store.js, words in practice-parts.js. Nothing is sent anywhere.
(function () {
  "use strict";

  const { fsrs, proposal, standing, order, stamp, readFile, writeFile, parseAnswer, judge, fill } = window.effattn.practice;
  const { KEYS, make, plural, readAgain, uuid, when, short } = window.effattn.practiceParts;
  const AGAIN = 1, HARD = 2, GOOD = 3, DAY = 86_400_000;

  class PracticeTrainer extends HTMLElement {
    connectedCallback() {
      if (this.ready) return;
      this.ready = true;
      this.data = JSON.parse(this.querySelector('script[type="application/json"]').textContent);
      this.model = fsrs(this.data.fsrs);
      this.store = new window.effattn.PracticeStore(() => window.localStorage, () => { this.load(); this.counts(); });
      this.drills = new Map(this.data.drills.map((drill) => [drill.id, drill]));
      this.cards = [...this.querySelectorAll(".practice-card")].map((node) => ({ node, id: node.dataset.id, kind: node.dataset.kind,
        topic: node.dataset.topic, title: node.dataset.title, level: node.dataset.level, typed: "" }));
      this.done = []; // {card, review} of this visit, for taking back and for the summary
      this.build();
      this.cards.forEach((card) => this.equip(card));
      this.load();
      this.rebuild();
      this.addEventListener("click", () => { // so that keys work after a click on plain text
        if (!this.contains(document.activeElement)) this.stage().focus({ preventScroll: true });
      });
      // Before the theme's own shortcuts (it takes "/" for its search).
      document.addEventListener("keydown", (event) => this.key(event), true);
    }

    /* ---- the parts that stand around the cards ---- */

    build() {
      const select = (name, label) => make("label", {}, label, make("select", { "data-filter": name, onchange: () => this.rebuild(true) }));
      const button = (text, action, extra) => make("button", { type: "button", onclick: action, ...extra }, text);
      this.filter = make("form", { "aria-label": "Choose cards", onsubmit: (event) => event.preventDefault() },
        select("topic", "Topic"), select("level", "Level"), select("kind", "Kind"), select("show", "Show"));
      this.line = make("p", { class: "practice-counts" });
      this.end = make("div", { class: "practice-end", tabindex: "-1", hidden: "", role: "group", "aria-label": "End of the round" });
      this.move = make("div", { class: "practice-row practice-move" }, button("← Previous", () => this.go(-1), { "data-do": "previous" }),
        button("Next →", () => this.go(1), { "data-do": "next" }), button("Undo the last rating", () => this.undo(), { "data-do": "undo" }));
      this.status = make("p", { class: "practice-status", role: "status", "aria-live": "polite" });
      this.alarm = make("p", { class: "practice-alarm", role: "alert" });
      this.file = make("input", { type: "file", accept: ".json,application/json", hidden: "", onchange: () => this.import() });
      this.foot = make("div", { class: "practice-row practice-foot" }, button("Export", () => this.export(), { "data-do": "export" }),
        button("Import", () => this.file.click(), { "data-do": "import" }),
        button("Forget everything…", () => this.askForget(), { "data-do": "forget" }),
        button("Keys (?)", () => this.help.showModal(), { "data-do": "help" }), this.file);
      const rows = KEYS.map(([key, does]) => make("tr", {}, make("th", { scope: "row" }, key), make("td", {}, does)));
      this.help = this.dialog("Keys", "practice-help", make("table", {}, make("tbody", {}, ...rows)),
        make("p", {}, "They work while the focus is in the trainer, and not while you type in a field."),
        make("div", { class: "practice-row" }, button("Close", () => this.help.close())));
      this.sure = make("p", {});
      this.confirm = this.dialog("Forget everything?", "practice-confirm", this.sure, make("div", { class: "practice-row" },
        button("Keep it", () => this.confirm.close(), { "data-do": "keep" }), button("Export first", () => this.export()),
        button("Forget", () => this.forget(), { "data-do": "really-forget", class: "practice-danger" })));
      this.prepend(this.filter, this.line);
      this.append(this.end, this.status, this.alarm, this.move, this.foot, this.help, this.confirm);
      this.setAttribute("role", "region");
      this.setAttribute("aria-label", "Practice trainer");
      const some = (values) => [...new Map(values)];
      const levels = ["junior", "mid", "senior", "staff"].filter((level) => this.cards.some((card) => card.level === level));
      this.options("topic", [["", "All topics"], ...some(this.cards.map((card) => [card.topic, card.title]))]);
      this.options("level", [["", "All levels"], ...levels.map((level) => [level, level])]);
      this.options("kind", [["", "All kinds"], ["spoken", "Questions"], ["case", "Cases"], ["number", "Numbers"]]
        .filter(([kind]) => !kind || this.cards.some((card) => card.kind === kind)));
      this.options("show", [["", "Due and new"], ["due", "Due"], ["new", "New"], ["all", "All"]]);
    }

    dialog(title, name, ...content) {
      return make("dialog", { class: name, "aria-labelledby": `${name}-title` }, make("h3", { id: `${name}-title` }, title), ...content);
    }

    /** Add to a card what only makes sense with JavaScript. */
    equip(card) {
      const answer = card.node.querySelector(".practice-answer"), question = card.node.querySelector(".practice-question");
      const show = card.reveal = make("button", { type: "button", class: "practice-primary", "data-do": "show",
        onclick: () => this.reveal() }, "Show the answer");
      if (card.kind === "number") {
        card.drill = this.drills.get(card.id);
        show.className = ""; // one main button: Check
        card.ask = card.node.querySelector(".practice-ask");
        card.input = make("input", { type: "text", autocomplete: "off", autocapitalize: "off", spellcheck: "false" });
        card.feedback = make("p", { class: "practice-feedback", role: "status", "aria-live": "polite" });
        const unit = card.drill.unit && card.drill.unit !== "×" ? ` in ${card.drill.unit === "$" ? "dollars" : card.drill.unit}` : "";
        card.try = make("form", { class: "practice-row", onsubmit: (event) => { event.preventDefault(); this.check(); } },
          make("label", {}, `Your answer${unit}`, card.input),
          make("button", { type: "submit", class: "practice-primary", "data-do": "check" }, "Check"), show,
          make("button", { type: "button", "data-do": "fresh", onclick: () => this.fresh(card, true) }, "Fresh numbers"));
        question.append(card.try, card.feedback);
      } else {
        card.area = make("textarea", { rows: "3", oninput: () => { card.typed = card.area.value; } });
        card.try = make("div", {}, make("label", {}, "Answer aloud, or write here (kept nowhere)", card.area), make("div", { class: "practice-row" }, show));
        question.append(card.try);
        card.points = [...card.node.querySelectorAll(".practice-rubric li")].map((item) => {
          const box = make("input", { type: "checkbox", onchange: () => this.propose() });
          const label = make("label", {}, box, make("span", {}, ...item.childNodes));
          item.replaceChildren(label);
          return box;
        });
      }
      card.rate = make("div", { class: "practice-rate", role: "group", "aria-label": "How well did it go?" },
        ...Object.entries(this.data.ratings).map(([rating, name]) => make("button",
          { type: "button", "data-rating": rating, onclick: () => this.rate(Number(rating)) }, make("b", {}, `${rating} ${name}`), make("small", {}))));
      card.why = make("p", { class: "practice-why" });
      answer.querySelector(".practice-links").before(card.why, card.rate);
    }

    /* ---- what is shown ---- */

    get value() { return Object.fromEntries([...this.filter.querySelectorAll("select")].map((s) => [s.dataset.filter, s.value])); }
    get card() { return this.queue[this.at]; }
    get revealed() { return Boolean(this.card) && !this.card.node.querySelector(".practice-answer").hidden; }
    stage() { return this.card ? this.card.node : this.end; }
    say(text) { this.status.textContent = text; }

    options(name, list) {
      const select = this.filter.querySelector(`[data-filter="${name}"]`);
      if (select.options.length) list.forEach(([, text], i) => { select.options[i].textContent = text; });
      else select.append(...list.map(([value, text]) => make("option", { value }, text)));
    }

    load() {
      this.reviews = this.store.all();
      this.states = this.model.replay(this.reviews);
    }

    /** Cards that the filter lets through; `free` ignores that field. */
    chosen(free) {
      const v = this.value;
      return this.cards.filter((card) => ["topic", "level", "kind"].every((field) => field === free || !v[field] || card[field] === v[field]));
    }

    wanted(card, now) {
      const show = this.value.show, where = standing(this.states.get(card.id), now);
      return show === "all" || where === show || (show === "" && where !== "later");
    }

    /** A new queue, from the filter. `announce` when the reader changed it. */
    rebuild(announce) {
      const now = Date.now();
      this.queue = order(this.chosen().filter((card) => this.wanted(card, now)), this.states, now, this.model);
      this.at = 0;
      this.show();
      if (announce) this.say(this.queue.length ? `${plural(this.queue.length, "card")} chosen.` : "No card chosen.");
    }

    counts() {
      const now = Date.now(), n = { due: 0, new: 0, later: 0 };
      this.chosen().forEach((card) => { n[standing(this.states.get(card.id), now)] += 1; });
      this.options("show", [["", `Due and new (${n.due + n.new})`], ["due", `Due (${n.due})`], ["new", `New (${n.new})`], ["all", `All (${n.due + n.new + n.later})`]]);
      for (const field of ["topic", "level", "kind"]) {
        const select = this.filter.querySelector(`[data-filter="${field}"]`), here = this.chosen(field);
        [...select.options].forEach((option) => {
          option.dataset.name = option.dataset.name || option.textContent;
          option.textContent = `${option.dataset.name} (${here.filter((card) => !option.value || card[field] === option.value).length})`;
        });
      }
      this.line.textContent = `${this.card ? `Card ${this.at + 1} of ${this.queue.length}. ` : ""}${n.due} due, ${n.new} new, ${n.later} later.`;
      const act = (name) => this.querySelector(`[data-do="${name}"]`);
      act("previous").disabled = this.at < 1;
      act("next").disabled = !this.card;
      act("undo").hidden = !this.done.length;
      const warning = this.store.warning();
      if (this.alarm.textContent !== warning) this.alarm.textContent = warning; // unchanged, it is not to be read out again
    }

    /** Show the card at `at`, question side up, or the end. */
    show() {
      this.cards.forEach((card) => { card.node.hidden = card !== this.card; });
      this.end.hidden = Boolean(this.card);
      if (!this.card) this.finish();
      else {
        const card = this.card;
        card.node.querySelector(".practice-answer").hidden = true;
        card.node.setAttribute("aria-label", `Card ${this.at + 1} of ${this.queue.length}: ${card.level}, ${card.title}`);
        card.node.querySelectorAll("details").forEach((d) => { d.open = false; });
        card.try.hidden = card.reveal.hidden = false;
        if (card.kind === "number") this.fresh(card, false);
        else { card.area.value = card.typed; card.points.forEach((box) => { box.checked = false; }); }
      }
      this.since = Date.now();
      this.counts();
    }

    finish() {
      const weak = this.done.filter(({ review }) => review.rating < GOOD), now = Date.now();
      const dues = this.chosen().map((card) => this.states.get(card.id)).filter(Boolean).map((state) => state.due).filter((due) => due > now);
      const parts = [make("h3", {}, this.queue.length ? "That was the last card of this round" : "No card here")];
      if (this.done.length) parts.push(make("p", {}, `${plural(this.done.length, "card")} rated in this visit, ${weak.length} of them Again or Hard.`));
      else if (!this.queue.length) parts.push(make("p", {}, "Nothing of this choice is due or new. Choose All to practise ahead of time, or another topic."));
      if (dues.length) parts.push(make("p", {}, `The next card of this choice is due ${when(Math.min(...dues), now)}.`));
      parts.push(...readAgain(weak.map(({ card }) => card.node)), make("div", { class: "practice-row" }, make("button", { type: "button", class: "practice-primary", "data-do": "again",
        onclick: () => { this.rebuild(true); this.stage().focus(); } }, "Look for cards again")));
      this.end.replaceChildren(...parts);
    }

    /* ---- a card's life ---- */

    reveal() {
      if (!this.card || this.revealed) return;
      const card = this.card, answer = card.node.querySelector(".practice-answer");
      answer.hidden = false;
      const minutes = Number(card.node.dataset.minutes || 0), took = Math.round((Date.now() - this.since) / 1000);
      card.seconds = took;
      card.pace = minutes ? `You took ${Math.floor(took / 60)}:${String(took % 60).padStart(2, "0")}; ${plural(minutes, "minute")} are meant.` : "";
      if (card.kind === "number") {
        card.node.querySelector(".practice-worked").textContent = fill(card.drill.worked, { ...card.instance.p, answer: card.instance.s });
        card.try.hidden = true;
      }
      card.reveal.hidden = true;
      const now = Date.now(), before = this.states.get(card.id) || null;
      card.rate.querySelectorAll("button").forEach((button) => {
        const days = Math.round((this.model.next(before, Number(button.dataset.rating), now).due - now) / DAY);
        button.querySelector("small").textContent = short(days);
        button.querySelector("small").title = `comes back in ${plural(days, "day")}`;
      });
      this.propose();
      answer.focus({ preventScroll: true });
      card.node.scrollIntoView({ block: "nearest" });
      this.say("The answer is shown.");
    }

    propose() {
      const card = this.card, name = (rating) => this.data.ratings[rating];
      if (card.kind === "number") {
        card.proposed = !card.right ? AGAIN : card.tries ? HARD : GOOD;
        card.why.textContent = `${card.right ? (card.tries ? "Right, not at once" : "Right at once") : "Not computed"}: ${name(card.proposed)} is proposed. You decide.`;
      } else {
        const points = card.points.map((box) => box.checked);
        card.proposed = proposal(points);
        card.why.textContent = `${points.filter(Boolean).length} of ${points.length} ticked: ${name(card.proposed)} is proposed. You decide. ${card.pace}`;
      }
      card.rate.querySelectorAll("button").forEach((button) => {
        const mine = Number(button.dataset.rating) === card.proposed;
        button.classList.toggle("practice-proposed", mine);
        if (mine) button.setAttribute("aria-describedby", "practice-proposed"); else button.removeAttribute("aria-describedby");
      });
      this.querySelectorAll("#practice-proposed").forEach((node) => node.removeAttribute("id"));
      card.why.id = "practice-proposed";
    }

    rate(rating) {
      const card = this.card, now = Date.now();
      const review = { id: uuid(), question: card.id, rating, reviewed_at: stamp(now),
        points: card.kind === "number" ? [] : card.points.map((box) => box.checked), seconds: card.seconds };
      this.store.add(review);
      this.done.push({ card, review });
      card.typed = "";
      this.load();
      const said = `${this.data.ratings[rating]}. It comes back ${when(this.states.get(card.id).due, now)}.`;
      this.at += 1;
      // What another tab has rated meanwhile need not be asked again.
      while (this.card && this.value.show !== "all" && !this.wanted(this.card, now)) this.at += 1;
      this.show();
      this.stage().focus();
      this.say(`${said} ${this.card ? "Next card." : "That was the last one."}`);
    }

    undo() {
      const last = this.done.pop();
      if (!last) { this.say("Nothing to take back in this visit."); return; }
      this.store.remove(last.review.id);
      this.load();
      const place = this.queue.indexOf(last.card);
      if (place >= 0) this.at = place; else { this.queue.splice(this.at, 0, last.card); }
      this.show();
      this.stage().focus();
      this.say("The last rating is taken back.");
    }

    go(step) {
      if (!this.queue.length || this.at + step < 0 || this.at + step > this.queue.length) return;
      this.at += step;
      this.show();
      this.stage().focus();
      this.say("");
    }

    /* ---- numbers ---- */

    /** Other numbers, never the same twice running. */
    fresh(card, asked) {
      const all = card.drill.instances, rest = all.filter((instance) => instance !== card.instance);
      card.instance = rest[Math.floor(Math.random() * rest.length)] || all[0];
      card.node.dataset.instance = all.indexOf(card.instance);
      card.tries = 0;
      card.right = false;
      card.ask.textContent = fill(card.drill.ask, card.instance.p);
      card.input.value = "";
      card.input.removeAttribute("aria-invalid");
      card.feedback.textContent = "";
      card.feedback.className = "practice-feedback";
      if (!asked) return;
      card.node.querySelector(".practice-answer").hidden = true;
      card.try.hidden = card.reveal.hidden = false;
      this.since = Date.now();
      card.node.focus();
      this.say("Fresh numbers.");
    }

    check() {
      const card = this.card, answer = parseAnswer(card.input.value, card.drill.dimension, card.drill.unit, this.data.units);
      const tell = (kind, text) => { card.feedback.className = `practice-feedback practice-${kind}`; card.feedback.textContent = text; };
      if (answer.error) card.input.setAttribute("aria-invalid", "true"); else card.input.removeAttribute("aria-invalid");
      if (answer.error) { tell("unclear", answer.error); card.input.focus(); return; } // a typing error is no attempt
      const verdict = judge(answer, card.drill, card.instance, this.data.units);
      if (verdict.right) { card.right = true; tell("right", "Right."); this.reveal(); this.say("Right. The working is shown."); return; }
      card.tries += 1;
      tell(verdict.slip ? "slip" : "wrong", verdict.say);
      card.input.focus();
      card.input.select();
    }

    /* ---- progress in and out ---- */

    export() {
      const file = new Blob([writeFile(this.store.all())], { type: "application/json" });
      const link = make("a", { href: URL.createObjectURL(file), download: `effattn-practice-${stamp(Date.now()).slice(0, 10)}.json` });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
      this.say(`${plural(this.store.all().length, "review")} exported.`);
    }

    import() {
      const file = this.file.files[0];
      if (!file) return;
      file.text().then((text) => {
        const reviews = readFile(text), added = this.store.merge(reviews);
        this.load();
        this.rebuild();
        this.say(`${plural(added, "review")} added, ${reviews.length - added} known already.`);
      }).catch((error) => {
        this.counts();
        this.say(`${file.name}: ${error.message} Nothing was imported.`);
      }).finally(() => { this.file.value = ""; });
    }

    askForget() {
      const n = this.store.all().length + this.store.damaged;
      this.sure.textContent = `${plural(n, "review")} will be deleted from this browser. There is no way back but an exported file.`;
      this.confirm.showModal();
      this.confirm.querySelector('[data-do="keep"]').focus();
    }

    forget() {
      this.store.clear();
      this.done = [];
      this.confirm.close();
      this.load();
      this.rebuild();
      this.stage().focus();
      this.say("Everything is forgotten.");
    }

    /* ---- keys ---- */

    key(event) {
      const at = document.activeElement;
      if (!this.contains(at) || at.closest("dialog")) return;
      const writing = at.matches("textarea, input[type=text]");
      const act = () => { event.preventDefault(); event.stopImmediatePropagation(); };
      if (writing && event.key === "Enter" && (event.ctrlKey || event.metaKey)) { act(); this.reveal(); return; }
      if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
      const choosing = at.matches("select");
      if (event.key === "Escape" && !choosing) { act(); this.stage().focus(); return; }
      if (choosing && event.key === "/") { act(); this.filter.querySelector("select").focus(); return; }
      if (writing || choosing) {
        event.stopImmediatePropagation(); // what is typed here is for this field
        return;
      }
      const card = this.card, inRubric = Boolean(at.closest(".practice-rubric"));
      const digit = /^[1-9]$/.test(event.key) ? Number(event.key) : 0;
      if (digit && inRubric) {
        act();
        if (card.points[digit - 1]) { card.points[digit - 1].click(); card.points[digit - 1].focus(); }
      } else if (digit && digit <= 4 && card) {
        act();
        if (this.revealed) this.rate(digit); else this.say("Show the answer first (Space).");
      } else if (event.key === "Enter" && inRubric) {
        act();
        card.rate.querySelector(`[data-rating="${card.proposed}"]`).focus();
      } else if ((event.key === "Enter" || event.key === " ") && !at.matches("button, a, summary, input, mjx-container")) {
        if (!card) return;
        if (!this.revealed) { act(); if (card.kind === "number" && event.key === "Enter") card.input.focus(); else this.reveal(); }
        else if (event.key === "Enter") { act(); (card.points && card.points[0] ? card.points[0] : card.rate.querySelector(".practice-proposed")).focus(); }
      } else {
        const does = { j: () => this.go(1), n: () => this.go(1), k: () => this.go(-1), p: () => this.go(-1), u: () => this.undo(),
          t: () => this.revealed && card.points && card.points[0] && card.points[0].focus(),
          w: () => card && !card.try.hidden && (card.area || card.input).focus(),
          r: () => card && card.kind === "number" && this.fresh(card, true),
          "/": () => this.filter.querySelector("select").focus(), "?": () => this.help.showModal() }[event.key];
        if (does) { act(); does(); }
      }
    }
  }

  const start = () => customElements.get("practice-trainer") || customElements.define("practice-trainer", PracticeTrainer);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
