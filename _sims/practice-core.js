/* The practice page's rules, free of any page: FSRS scheduling, the exchange file, reading and judging a number.
   Parameters, units and drills come from Python when the book is built. Tests hold this file to the package:
   scheduling to effattn_lab.interview.schedule, the file to effattn_lab.interview.progress. */
(function () {
  "use strict";

  const AGAIN = 1, HARD = 2, GOOD = 3, EASY = 4, DAY = 86_400_000;
  const FORMAT = "effattn-practice", VERSION = 1;

  /* FSRS-6 with whole days, without learning steps and without fuzzing, as the Python library `fsrs` has it.
     s: {parameters, retention, maximum_interval, stability_min, difficulty_min, difficulty_max}. */
  function fsrs(s) {
    const w = s.parameters, decay = -w[20], factor = 0.9 ** (1 / decay) - 1;
    const clampD = (d) => Math.min(Math.max(d, s.difficulty_min), s.difficulty_max);
    const clampS = (x) => Math.max(x, s.stability_min);
    const firstD = (rating) => w[4] - Math.E ** (w[5] * (rating - 1)) + 1;

    const retrievability = (days, stability) => (1 + (factor * days) / stability) ** decay;

    /** Days until the chance of recall falls to the wanted one; halves go to the even number, as in Python. */
    function interval(stability) {
      const x = (stability / factor) * (s.retention ** (1 / decay) - 1), floor = Math.floor(x);
      const days = x - floor === 0.5 ? floor + (floor % 2) : Math.round(x);
      return Math.min(Math.max(days, 1), s.maximum_interval);
    }

    function nextD(d, rating) {
      const damped = d + ((10 - d) * -(w[6] * (rating - 3))) / 9;
      return clampD(w[7] * firstD(EASY) + (1 - w[7]) * damped);
    }

    function sameDayS(x, rating) {
      const grown = Math.E ** (w[17] * (rating - 3 + w[18])) * x ** -w[19];
      return clampS(x * (rating === AGAIN ? grown : Math.max(grown, 1)));
    }

    function laterS(x, d, r, rating) {
      if (rating === AGAIN) {
        const long = w[11] * d ** -w[12] * ((x + 1) ** w[13] - 1) * Math.E ** ((1 - r) * w[14]);
        return clampS(Math.min(long, x / Math.E ** (w[17] * w[18])));
      }
      const bonus = (rating === HARD ? w[15] : 1) * (rating === EASY ? w[16] : 1);
      return clampS(x * (1 + Math.E ** w[8] * (11 - d) * x ** -w[9] * (Math.E ** ((1 - r) * w[10]) - 1) * bonus));
    }

    /** State after one review at `at` (ms); `before` is null for the first. */
    function next(before, rating, at) {
      let stability = clampS(w[rating - 1]), difficulty = clampD(firstD(rating)), reviews = 1;
      if (before) {
        const days = Math.floor((at - before.last) / DAY);
        stability = days < 1 ? sameDayS(before.stability, rating)
          : laterS(before.stability, before.difficulty, retrievability(days, before.stability), rating);
        difficulty = nextD(before.difficulty, rating);
        reviews = before.reviews + 1;
      }
      return { stability, difficulty, last: at, due: at + interval(stability) * DAY, reviews };
    }

    /** Question → state, from all reviews in any order; a repeated id counts once. */
    function replay(reviews) {
      const seen = new Set(), states = new Map();
      for (const r of [...reviews].sort(earlier)) {
        if (seen.has(r.id)) continue;
        seen.add(r.id);
        states.set(r.question, next(states.get(r.question) || null, r.rating, Date.parse(r.reviewed_at)));
      }
      return states;
    }

    const recall = (state, now) => retrievability(Math.max(0, Math.floor((now - state.last) / DAY)), state.stability);
    return { next, replay, interval, retrievability, recall };
  }

  const earlier = (a, b) => Date.parse(a.reviewed_at) - Date.parse(b.reviewed_at) || (a.id < b.id ? -1 : a.id > b.id ? 1 : 0);

  /** The rating that the ticked points suggest: all Good, half of them Hard, fewer Again. Easy is the learner's to say. */
  function proposal(points) {
    const share = points.length ? points.filter(Boolean).length / points.length : 1;
    return share === 1 ? GOOD : share >= 0.5 ? HARD : AGAIN;
  }

  /** "due", "new" or "later". */
  const standing = (state, now) => (!state ? "new" : state.due <= now ? "due" : "later");

  /** Cards in the order to ask them: due ones, the least likely to be recalled first, then new, then the others. */
  function order(cards, states, now, model) {
    const rank = { due: 0, new: 1, later: 2 };
    const keyed = cards.map((card, index) => {
      const state = states.get(card.id), where = standing(state, now);
      const key = where === "due" ? model.recall(state, now) : where === "later" ? state.due : 0;
      return { card, where: rank[where], key, index };
    });
    return keyed.sort((a, b) => a.where - b.where || a.key - b.key || a.index - b.index).map((k) => k.card);
  }

  /** UTC to the second, as the file has it. */
  const stamp = (ms) => new Date(Math.floor(ms / 1000) * 1000).toISOString().replace(".000Z", "Z");

  const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/i;
  const TIME = /^\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$/i;
  const brief = (x) => { const text = JSON.stringify(x) || String(x); return text.length > 60 ? text.slice(0, 57) + "..." : text; };

  /** A review with exactly the format's fields. Throws an Error that names the field, what was expected, what came. */
  function review(data) {
    const fail = (field, expected) => { throw new Error(`${field}: expected ${expected}, got ${brief(data[field])}`); };
    if (typeof data !== "object" || data === null || Array.isArray(data)) throw new Error(`expected an object, got ${brief(data)}`);
    for (const field of ["id", "question", "rating", "reviewed_at", "points", "seconds"]) {
      if (!(field in data)) throw new Error(`${field}: missing`);
    }
    if (typeof data.id !== "string" || !UUID.test(data.id)) fail("id", "a UUID");
    if (typeof data.question !== "string" || !data.question || data.question.length > 200) fail("question", "1 to 200 characters");
    if (![AGAIN, HARD, GOOD, EASY].includes(data.rating)) fail("rating", "1, 2, 3 or 4");
    const at = typeof data.reviewed_at === "string" && TIME.test(data.reviewed_at) ? Date.parse(data.reviewed_at) : NaN;
    if (!(at >= Date.UTC(2000, 0) && at < Date.UTC(2200, 0))) fail("reviewed_at", "a time like 2026-11-28T10:00:00Z");
    if (!Array.isArray(data.points) || !data.points.every((p) => typeof p === "boolean")) fail("points", "a list of true and false");
    if (typeof data.seconds !== "number" || !(data.seconds >= 0 && data.seconds < 1e9)) fail("seconds", "a number from 0 to 1e9");
    return { id: data.id.toLowerCase(), question: data.question, rating: data.rating, reviewed_at: stamp(at),
      points: [...data.points], seconds: Math.round(data.seconds) };
  }

  /** Reviews of an exchange file's text, all of them checked. Throws an Error with a sentence for the reader. */
  function readFile(text) {
    let data;
    try { data = JSON.parse(text); } catch (error) { throw new Error("This is not a JSON file."); }
    if (typeof data !== "object" || data === null || data.format !== FORMAT) {
      throw new Error(`This is not a file of practice reviews: expected format ${brief(FORMAT)}, got ${brief(data && data.format)}.`);
    }
    if (!Number.isInteger(data.version) || data.version < 1) throw new Error(`version: expected ${VERSION}, got ${brief(data.version)}.`);
    if (data.version > VERSION) {
      throw new Error(`A newer program wrote this file (format ${data.version}; this page knows ${VERSION}). Open it with a newer edition of the book.`);
    }
    if (!Array.isArray(data.reviews)) throw new Error(`reviews: expected a list, got ${brief(data.reviews)}.`);
    return data.reviews.map((entry, i) => {
      try { return review(entry); } catch (error) { throw new Error(`reviews[${i}]: ${error.message}.`); }
    });
  }

  /** Text of an exchange file: equal histories give equal files. */
  function writeFile(reviews) {
    const lines = [...reviews].sort(earlier).map((r) => JSON.stringify(review(r)));
    return `{"format": "${FORMAT}", "version": ${VERSION}, "reviews": [\n${lines.join(",\n")}\n]}\n`;
  }

  const NUMBER = /^([+-]?)(\d{1,3}(?:[,\u202f\u00a0 '_]\d{3})+|\d+)?(\.\d+)?(?:e([+-]?\d+)|\s*[x×*·]\s*10(?:\^|\*\*)([+-]?\d+))?\s*(.*)$/i;
  const ALIASES = { byte: "B", bytes: "B", flops: "FLOP", us: "µs", "μs": "µs", sec: "s", seconds: "s", x: "×", times: "×", percent: "%",
    "flop/byte": "FLOP/B", "flops/byte": "FLOP/B", "flops/b": "FLOP/B", token: "tokens", sequence: "sequences", seqs: "sequences",
    dollars: "$", usd: "$", hours: "h", minutes: "min" };

  /** Size of a unit as a reader writes it (GiB, gb, TFLOPs, 3G …) in the dimension's first unit, or null. */
  function unitSize(name, dimension, units) {
    const table = units[dimension], base = Object.keys(table)[0];
    const lower = (text) => text.toLowerCase();
    const find = (text) => text && (table[text] || table[Object.keys(table).find((u) => u && lower(u) === lower(text))]);
    const known = find(name) || find(ALIASES[lower(name)]) || find(name.replace(/s$/i, "")) || find(name + base);
    if (known) return known;
    const si = { k: 1e3, m: 1e6, g: 1e9, t: 1e12 }[lower(name)];
    return si && dimension === "number" ? si : null;
  }

  /** Read an answer. unit: the one that was asked for, which a bare number is in.
      Gives {value (in the dimension's first unit), given (the bare number, or null if a unit was named)} or {error}. */
  function parseAnswer(text, dimension, unit, units) {
    const clean = text.trim().replace(/[−–]/g, "-").replace(/^[~≈=]\s*/, "").replace(/^\$\s*/, dimension === "money" ? "" : "$");
    if (!clean) return { error: "Type a number first." };
    const m = NUMBER.exec(clean), digits = m && (m[2] || "") + (m[3] || "");
    if (!digits || /^[,.\d]/.test(m[6])) {
      return { error: `“${text.trim()}” is not a number I can read. Write it as 1500, 1,500, 1.5e9 or 16 GiB, with a point before decimals.` };
    }
    const plain = (m[2] || "0").replace(/\D/g, "");
    const given = Number(`${m[1]}${plain}${m[3] || ""}e${m[4] || m[5] || 0}`);
    const named = m[6].replace(/\s+/g, "").replace(/\.$/, "");
    if (!named) return { value: given * units[dimension][unit], given };
    if (dimension === "bytes" && /bits?$/i.test(named)) return { error: "Those are bits. Answer in bytes, 8 bits each." };
    const size = unitSize(named, dimension, units);
    if (!size) {
      const some = Object.keys(units[dimension]).filter(Boolean).slice(0, 9).join(", ");
      return { error: `“${m[6].trim()}” is not a unit that fits this question.${some ? ` Known: ${some}.` : ""}` };
    }
    return { value: given * size, given: null };
  }

  /** Compare with one instance of a drill. Gives {right} or {right: false, slip, say}. */
  function judge(answer, drill, instance, units) {
    const near = (x, y) => Math.abs(x - y) <= drill.tol * Math.abs(y) + 1e-9 * Math.abs(y);
    if (near(answer.value, instance.a)) return { right: true };
    const no = (slip, say) => ({ right: false, slip, say });
    for (const [index, value] of instance.w) if (near(answer.value, value)) return no(true, fill(drill.says[index], instance.p));
    for (const [factor, say] of drill.mixed) if (near(answer.value, factor * instance.a)) return no(true, say);
    if (answer.given !== null) {
      const [other] = Object.entries(units[drill.dimension]).find(([, size]) => near(answer.given * size, instance.a)) || [];
      if (other) return no(true, `That is right in ${other}, and ${drill.unit} was asked for. Put the unit behind the number, or convert it.`);
    }
    const ratio = answer.value / instance.a, power = Math.round(Math.log10(ratio));
    if (power && Number.isFinite(power) && near(answer.value, 10 ** power * instance.a)) return no(true, `The digits are right, the power of ten is not: you are ${ratio > 1 ? "above" : "below"} it.`);
    return no(false, ratio > 1 ? "Not that. It is less." : "Not that. It is more.");
  }

  /** Put the values into a text's {name} fields. */
  const fill = (text, values) => text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));

  window.effattn = window.effattn || {};
  window.effattn.practice = { fsrs, proposal, standing, order, stamp, review, readFile, writeFile, parseAnswer, judge, fill };
})();
