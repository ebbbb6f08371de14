// Keeps what is marked `data-live` up to date. Pages work without it: they load anew.
"use strict";

(() => {
  const LONGEST_PAUSE = 30;

  const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

  const visible = () =>
    new Promise((done) => {
      if (!document.hidden) return done();
      const look = () => {
        if (document.hidden) return;
        document.removeEventListener("visibilitychange", look);
        done();
      };
      document.addEventListener("visibilitychange", look);
    });

  const stateOf = (region) => region.querySelector("[data-state]")?.dataset.state;

  function show(region, text) {
    const before = stateOf(region);
    region.innerHTML = text;
    const after = stateOf(region);
    const announce = document.getElementById("announce");
    if (announce && after !== before) announce.textContent = `The job is ${after}.`;
    if (region.querySelector("[data-terminal]"))
      for (const each of document.querySelectorAll('[data-until="terminal"]')) each.remove();
  }

  async function follow(region) {
    const every = Number(region.dataset.seconds);
    let wait = every;
    let shown = "";
    for (;;) {
      await pause(wait);
      await visible();
      let answer, text;
      try {
        answer = await fetch(region.dataset.live, { cache: "no-store" });
        text = await answer.text();
      } catch {
        answer = null;
      }
      if (answer?.status === 401) return location.reload();
      region.classList.toggle("stale", !answer?.ok);
      if (!answer?.ok) {
        wait = Math.min(2 * wait, LONGEST_PAUSE);
        continue;
      }
      wait = every;
      // Whoever has the keyboard or a selection in it is not disturbed.
      const busy = region.contains(document.activeElement) || selects(region);
      if (text !== shown && !busy) {
        show(region, text);
        shown = text;
      }
      if (answer.headers.has("Exportd-Settled") && shown === text) return;
    }
  }

  function selects(region) {
    const selection = getSelection();
    return !selection.isCollapsed && selection.containsNode(region, true);
  }

  for (const region of document.querySelectorAll("[data-live]")) follow(region);
})();
