// Small repairs that need the laid-out page.
(function () {
  "use strict";
  const BOXES = ".pst-scrollable-table-container, .bd-article pre, .bd-article div.math, .sim-frame";

  // A box that scrolls sideways must be reachable with the keyboard; one that does not must not be a stop.
  function markScrollers() {
    document.querySelectorAll(BOXES).forEach((box) => {
      const scrolls = box.scrollWidth > box.clientWidth + 1;
      const focusable = scrolls && (box.matches(".sim-frame") ? !box.querySelector("button, select, input, [tabindex]") : true);
      if (focusable) box.setAttribute("tabindex", "0");
      else if (box.hasAttribute("tabindex")) box.removeAttribute("tabindex");
      if (box.matches(".pst-scrollable-table-container")) {
        if (focusable) { box.setAttribute("role", "group"); box.setAttribute("aria-label", "Table, scrolls sideways"); }
        else { box.removeAttribute("role"); box.removeAttribute("aria-label"); }
      }
    });
  }

  let waiting = 0;
  const soon = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(markScrollers); };
  window.addEventListener("load", () => {
    const typeset = window.MathJax && window.MathJax.startup && window.MathJax.startup.promise;
    Promise.resolve(typeset).then(soon, soon);
    window.addEventListener("resize", soon);
    document.addEventListener("toggle", soon, true);
    document.addEventListener("change", soon, true);
  });

  // On paper, folded answers are open.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll(".bd-article details:not([open])")];
    opened.forEach((d) => { d.open = true; });
  });
  window.addEventListener("afterprint", () => { opened.forEach((d) => { d.open = false; }); opened = []; });
})();
