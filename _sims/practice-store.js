/* Where the practice page keeps reviews: this browser's localStorage, one entry a review.
   Entries are only added and never rewritten, so two tabs that save in the same moment cannot lose each other's.
   What cannot be stored (no storage, no room) stays in memory, and is stored later if that becomes possible. */
(function () {
  "use strict";

  const PREFIX = "effattn-practice/review/";

  class PracticeStore {
    /** storage: a function that gives a Storage, and may throw. changed: called after another tab's change. */
    constructor(storage, changed) {
      this.pending = new Map();
      this.damaged = 0;
      /* "": all is well. "unavailable": nothing can be kept. "full": no room for the last reviews. */
      this.trouble = "";
      try {
        this.storage = storage();
        this.storage.setItem("effattn-practice/probe", "1");
        this.storage.removeItem("effattn-practice/probe");
      } catch (error) {
        // A full storage can still be read; one that is switched off cannot.
        try { this.storage.getItem(PREFIX); this.trouble = "full"; } catch (nothing) { this.storage = null; this.trouble = "unavailable"; }
      }
      if (changed && this.storage) {
        window.addEventListener("storage", (event) => {
          if (event.key === null || event.key.startsWith(PREFIX)) changed();
        });
      }
    }

    keys() {
      const keys = [];
      for (let i = 0; this.storage && i < this.storage.length; i += 1) {
        const key = this.storage.key(i);
        if (key.startsWith(PREFIX)) keys.push(key);
      }
      return keys;
    }

    /** All reviews, stored and pending. An entry that cannot be understood is left where it is and counted. */
    all() {
      const found = new Map();
      this.damaged = 0;
      for (const key of this.keys()) {
        try {
          const review = window.effattn.practice.review(JSON.parse(this.storage.getItem(key)));
          found.set(review.id, review);
        } catch (error) { this.damaged += 1; }
      }
      for (const [id, review] of this.pending) if (!found.has(id)) found.set(id, review);
      return [...found.values()];
    }

    /** Keep one review. It is never lost while the page is open; see `trouble` for whether it is stored. */
    add(review) {
      this.pending.set(review.id, review);
      this.flush();
    }

    flush() {
      if (!this.storage) return;
      this.trouble = "";
      for (const [id, review] of this.pending) {
        try {
          this.storage.setItem(PREFIX + id, JSON.stringify(review));
          this.pending.delete(id);
        } catch (error) { this.trouble = "full"; return; }
      }
    }

    /** Add what is new by id; returns how many. All or nothing: throws, with nothing changed, if they do not fit. */
    merge(reviews) {
      const known = new Set(this.all().map((review) => review.id)), added = [];
      for (const review of reviews) {
        if (known.has(review.id)) continue;
        known.add(review.id);
        if (!this.storage) { this.pending.set(review.id, review); added.push(review.id); continue; }
        try { this.storage.setItem(PREFIX + review.id, JSON.stringify(review)); added.push(review.id); }
        catch (error) {
          added.forEach((id) => this.storage.removeItem(PREFIX + id));
          this.trouble = "full";
          throw new Error("This browser has no room for these reviews.");
        }
      }
      return added.length;
    }

    remove(id) {
      this.pending.delete(id);
      if (this.storage) this.storage.removeItem(PREFIX + id);
    }

    /** What the reader must know, or "". */
    warning() {
      const lost = this.pending.size;
      if (this.trouble === "unavailable") {
        return `This browser lets the page store nothing. ${lost ? `${reviews(lost)} of this visit will be lost when the page closes: export first.`
          : "Reviews will last until the page closes; export them before."}`;
      }
      if (this.trouble === "full" && lost) {
        return `The browser's storage is full. ${reviews(lost)} could not be stored and will be lost when the page closes: export now.`;
      }
      if (!this.damaged) return "";
      return this.damaged === 1 ? "1 stored entry cannot be read and is left alone." : `${this.damaged} stored entries cannot be read and are left alone.`;
    }

    /** Forget everything, damaged entries too. */
    clear() {
      this.pending.clear();
      this.keys().forEach((key) => this.storage.removeItem(key));
      this.flush();
    }
  }

  const reviews = (n) => (n === 1 ? "1 review" : `${n.toLocaleString("en")} reviews`);

  window.effattn = window.effattn || {};
  window.effattn.PracticeStore = PracticeStore;
})();
