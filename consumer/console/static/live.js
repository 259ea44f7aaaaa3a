// Looks at the page's live part every two seconds while the page is in sight, and puts in what has changed.
//
// Without it the page is the same and has a link to refresh it. Markup comes parsed, as a document: no text is ever made
// into markup here, which the content security policy would forbid.
"use strict";

(() => {
  const PAUSE_MS = 2000;
  const address = document.body.dataset.live;
  const place = document.querySelector(".turn");
  if (!address || !place) return;

  const status = Number(document.body.dataset.status);
  let paused = false;
  let timer = 0;
  let heardAt = new Date();

  const button = document.createElement("button");
  button.type = "button";
  place.replaceChildren(button);

  const say = (state, words) => {
    button.className = state;
    button.textContent = words;
    button.title = paused ? "Go on refreshing every two seconds" : "Stop refreshing, to read in peace";
  };

  const parts = (root) => new Map([...root.querySelectorAll("[data-part]")].map((e) => [e.dataset.part, e]));

  // What somebody is selecting, or has opened, stays as it is until they are done.
  const isInUse = (part) => {
    const selection = document.getSelection();
    const selected = selection && !selection.isCollapsed && selection.containsNode(part, true);
    return selected || part.querySelector("details[open]") !== null;
  };

  const put = (fresh) => {
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

  const lost = () => say("is-lost", `No answer since ${heardAt.toISOString().slice(11, 19)} UTC`);

  const look = () => {
    clearTimeout(timer);
    if (paused || document.hidden) return;
    const request = new XMLHttpRequest();
    request.open("GET", address);
    request.responseType = "document";
    request.timeout = 5000;
    request.onload = () => {
      // Found at last, or gone: another page altogether.
      if (request.status !== status) return location.reload();
      if (!request.response) return lost();
      heardAt = new Date();
      put(request.response);
      say("is-live", "Live");
    };
    request.onerror = request.ontimeout = lost;
    request.onloadend = () => {
      clearTimeout(timer);
      timer = setTimeout(look, PAUSE_MS);
    };
    request.send();
  };

  button.addEventListener("click", () => {
    paused = !paused;
    if (paused) say("is-paused", "Paused");
    else look();
  });
  document.addEventListener("visibilitychange", look);
  say("is-live", "Live");
  timer = setTimeout(look, PAUSE_MS);
})();
