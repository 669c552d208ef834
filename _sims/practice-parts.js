/* Words and small tools of the practice page. */
(function () {
  "use strict";

  const DAY = 86_400_000;
  const KEYS = [
    ["Space or Enter", "show the answer; Enter then goes on to the rubric, and from there to the proposed rating"],
    ["1 2 3 4", "rate Again, Hard, Good, Easy; while the focus is in the rubric: tick that point"],
    ["t", "go to the rubric"], ["w", "write your answer (Ctrl+Enter in the field shows the answer)"], ["Esc", "back to the card"],
    ["r", "fresh numbers, in a numeric card"], ["j or n", "next card"], ["k or p", "previous card"],
    ["u", "take the last rating back"], ["/", "go to the filter"], ["?", "this help"],
  ];

  /** make("p", {class: "x", onclick: f}, "text", child …) */
  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value); else node.setAttribute(name, value);
    }
    node.append(...children);
    return node;
  }

  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
  const uuid = () => (window.crypto.randomUUID ? window.crypto.randomUUID()
    : "10000000-1000-4000-8000-100000000000".replace(/[018]/g, (c) => // no randomUUID outside secure contexts
      (c ^ (window.crypto.getRandomValues(new Uint8Array(1))[0] & (15 >> (c / 4)))).toString(16)));

  /** "tomorrow", "in 8 days (6 Dec)" */
  function when(due, now) {
    const days = Math.round((due - now) / DAY);
    if (days < 1) return "today";
    const date = new Date(due);
    const year = date.getFullYear() === new Date(now).getFullYear() ? {} : { year: "numeric" };
    return `${days === 1 ? "tomorrow" : `in ${plural(days, "day")}`} (${date.toLocaleDateString("en-GB", { day: "numeric", month: "short", ...year })})`;
  }
  const short = (days) => (days < 60 ? `${days} d` : days < 720 ? `${Math.round(days / 30)} mo` : `${Math.round(days / 365)} y`);

  /** Links to the sections of these cards, each once; nothing if there is none. */
  function readAgain(cards) {
    const links = new Map(cards.flatMap((card) => [...card.querySelectorAll(".practice-links a[href*='#']")].slice(0, 1)
      .map((a) => [a.getAttribute("href"), a.textContent])));
    if (!links.size) return [];
    return [make("p", {}, "Read again before they come back:"),
      make("ul", {}, ...[...links].map(([href, text]) => make("li", {}, make("a", { href }, text))))];
  }

  window.effattn = window.effattn || {};
  window.effattn.practiceParts = { KEYS, make, plural, readAgain, uuid, when, short };
})();
