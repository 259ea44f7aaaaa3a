// Polls the page's live part every two seconds while the page is visible, and replaces the parts that have changed.
//
// Without JavaScript the page has a link to refresh it. Markup arrives as a parsed document: the content security policy
// forbids creating markup from text.
"use strict";

(() => {
  const PAUSE_MS = 2000;
  const address = document.body.dataset.live;
  const place = document.querySelector(".turn");
  if (!address || !place) return;

  const status = Number(document.body.dataset.status);
  let paused = false;
  let timer = 0;
  let respondedAt = new Date();

  const button = document.createElement("button");
  button.type = "button";
  place.replaceChildren(button);

  const show = (state, label) => {
    button.className = state;
    button.textContent = label;
    button.title = paused ? "Resume refreshing every two seconds" : "Stop refreshing";
  };

  const parts = (root) => new Map([...root.querySelectorAll("[data-part]")].map((e) => [e.dataset.part, e]));

  // A part with a selection or an open detail is not replaced.
  const isInUse = (part) => {
    const selection = document.getSelection();
    const selected = selection && !selection.isCollapsed && selection.containsNode(part, true);
    return selected || part.querySelector("details[open]") !== null;
  };

  const replaceParts = (fresh) => {
    const focused = document.activeElement?.closest?.("a[href]")?.getAttribute("href");
    const before = parts(document);
    for (const [name, part] of parts(fresh)) {
      const old = before.get(name);
      if (!old || old.isEqualNode(part) || isInUse(old)) continue;
      const held = focused && old.contains(document.activeElement);
      const now = document.importNode(part, true);
      old.replaceWith(now);
      if (held) [...now.querySelectorAll("a[href]")].find((a) => a.getAttribute("href") === focused)?.focus();
    }
  };

  const lost = () => show("is-lost", `No response since ${respondedAt.toISOString().slice(11, 19)} UTC`);

  const poll = () => {
    clearTimeout(timer);
    if (paused || document.hidden) return;
    const request = new XMLHttpRequest();
    request.open("GET", address);
    request.responseType = "document";
    request.timeout = 5000;
    request.onload = () => {
      // The run was stored or removed meanwhile: it is another page.
      if (request.status !== status) return location.reload();
      if (!request.response) return lost();
      respondedAt = new Date();
      replaceParts(request.response);
      show("is-live", "Live");
    };
    request.onerror = request.ontimeout = lost;
    request.onloadend = () => {
      clearTimeout(timer);
      timer = setTimeout(poll, PAUSE_MS);
    };
    request.send();
  };

  button.addEventListener("click", () => {
    paused = !paused;
    if (paused) show("is-paused", "Paused");
    else poll();
  });
  document.addEventListener("visibilitychange", poll);
  show("is-live", "Live");
  timer = setTimeout(poll, PAUSE_MS);
})();
