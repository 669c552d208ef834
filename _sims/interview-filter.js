/* Filter of the interview bank: by topic, level and words. The questions are on the page already; without this
   script all of them are shown. The address keeps the filter: #topic=full/flash&level=senior&words=merge. */
(function () {
  "use strict";

  const FIELDS = ["topic", "level", "words"];

  /** Filter that an address's hash describes; fields that it does not name are "". */
  function parseHash(hash) {
    const given = new URLSearchParams(hash.replace(/^#/, ""));
    return Object.fromEntries(FIELDS.map((field) => [field, given.get(field) || ""]));
  }

  /** Hash that describes a filter; "" for the filter that lets everything through. */
  function formatHash(filter) {
    const kept = new URLSearchParams(FIELDS.filter((f) => filter[f]).map((f) => [f, filter[f]]));
    return kept.toString().replaceAll("%2F", "/");
  }

  /** Does a question {topic, level, text} pass? Every word must occur; case and accents do not count. */
  function matches(filter, question) {
    const flat = (text) => text.toLowerCase().normalize("NFD").replace(/[\u0300-\u036f]/g, "");
    const text = flat(question.text);
    return (
      (!filter.topic || question.topic === filter.topic) &&
      (!filter.level || question.level === filter.level) &&
      flat(filter.words).split(/\s+/).every((word) => text.includes(word))
    );
  }

  window.effattn = window.effattn || {};
  window.effattn.interviewFilter = { parseHash, formatHash, matches };

  class InterviewFilter extends HTMLElement {
    connectedCallback() {
      if (this.firstChild) return;
      this.sections = [...document.querySelectorAll(".interview-topic")];
      this.items = [...document.querySelectorAll(".interview-topic details.interview")].map((node) => ({
        node, topic: node.dataset.topic, level: node.dataset.level, text: node.textContent,
      }));
      this.build();
      window.addEventListener("hashchange", () => this.follow());
      this.follow();
    }

    build() {
      const levels = ["junior", "mid", "senior", "staff"].filter((l) => this.items.some((i) => i.level === l));
      const topics = this.sections.map((section) => [
        section.querySelector("details.interview").dataset.topic,
        section.querySelector("h2, h3").firstChild.textContent.trim(),
      ]);
      this.form = document.createElement("form");
      this.form.setAttribute("role", "search");
      this.form.setAttribute("aria-label", "Interview questions");
      const fields = this.add(this.form, "fieldset");
      this.add(fields, "legend", "Choose questions");
      this.controls = {
        topic: this.select(fields, "Topic", [["", "All topics"], ...topics]),
        level: this.select(fields, "Level", [["", "All levels"], ...levels.map((l) => [l, l])]),
        words: this.search(fields),
      };
      const row = this.add(fields, "div");
      row.className = "interview-row";
      this.status = this.add(row, "p");
      this.status.setAttribute("role", "status");
      this.status.setAttribute("aria-live", "polite");
      this.button(row, "Clear", () => { this.set(parseHash("")); this.apply(); this.controls.topic.focus(); });
      this.button(row, "One at random", () => this.random());
      this.button(row, "Fold all answers", () => this.items.forEach((item) => { item.node.open = false; }));
      this.form.addEventListener("input", () => this.apply());
      this.form.addEventListener("submit", (event) => event.preventDefault());
      this.append(this.form);
    }

    add(parent, tag, text) {
      const node = document.createElement(tag);
      if (text) node.textContent = text;
      parent.append(node);
      return node;
    }

    select(parent, name, options) {
      const control = this.add(this.add(parent, "label", name), "select");
      for (const [value, text] of options) this.add(control, "option", text).value = value;
      return control;
    }

    search(parent) {
      const label = this.add(parent, "label", "Words in question or answer");
      label.className = "interview-wide";
      const control = this.add(label, "input");
      control.type = "search";
      control.autocomplete = "off";
      return control;
    }

    button(parent, text, action) {
      const control = this.add(parent, "button", text);
      control.type = "button";
      control.addEventListener("click", action);
    }

    get() {
      return Object.fromEntries(FIELDS.map((field) => [field, this.controls[field].value]));
    }

    set(filter) {
      for (const field of FIELDS) {
        this.controls[field].value = filter[field];
        if (this.controls[field].selectedIndex < 0) this.controls[field].value = ""; // no such topic or level
      }
    }

    /** The hash is a filter (#level=mid), or names one question: then show everything and open that one. */
    follow() {
      const target = this.items.find((item) => "#" + item.node.id === location.hash);
      if (target) {
        this.set(parseHash(""));
        this.show();
        target.node.open = true;
        target.node.scrollIntoView();
      } else if (location.hash === "" || location.hash.includes("=")) {
        this.set(parseHash(location.hash));
        this.show();
      }
    }

    apply() {
      const hash = formatHash(this.get());
      history.replaceState(null, "", hash ? "#" + hash : location.pathname + location.search);
      this.show();
    }

    show() {
      const filter = this.get();
      let shown = 0;
      for (const item of this.items) {
        item.node.hidden = !matches(filter, item);
        if (!item.node.hidden) shown += 1;
      }
      for (const section of this.sections) {
        section.hidden = !section.querySelector("details.interview:not([hidden])");
      }
      this.status.textContent = `${shown} of ${this.items.length} questions`;
    }

    random() {
      const open = this.items.filter((item) => !item.node.hidden);
      if (!open.length) return;
      const { node } = open[Math.floor(Math.random() * open.length)];
      node.open = false;
      node.scrollIntoView({ block: "center" });
      node.querySelector("summary").focus({ preventScroll: true });
    }
  }

  const define = () => customElements.define("interview-filter", InterviewFilter);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", define);
  else define();
})();
