// What was said in each session while this page was open. The server keeps no text, so it is gone with the page; for each
// version the lines that led to it are kept, so that a rollback shows what the session remembers.

import { $, element } from "./dom.js";

const histories = new Map();
const WHO = { user: "You", assistant: "Model", note: "" };

function history(id) {
  if (!histories.has(id)) histories.set(id, { lines: [], versions: new Map() });
  return histories.get(id);
}

export function shown(session) {
  const { lines } = session === null ? { lines: [] } : history(session.id);
  $("log").replaceChildren(...lines.map((line) => line.element));
  if (lines.length === 0 && session !== null && session.tokens_seen > 0) {
    $("log").append(element("p", { className: "soft", text: "What this session has read is in its memory; its text is not kept." }));
  }
  $("log").scrollTop = $("log").scrollHeight;
}

// A line that can grow: add(text), done(), lost(why) for what the session has not read.
export function line(id, kind, text = "") {
  const words = document.createTextNode(text);
  const body = element("p", { className: "text" }, words);
  const made = element("article", { className: kind }, body);
  if (WHO[kind]) made.prepend(element("p", { className: "who", text: WHO[kind] }));
  const one = {
    element: made,
    begin: () => made.setAttribute("aria-busy", "true"),
    add(more) {
      const log = $("log");
      const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      words.appendData(more);
      if (follows) log.scrollTop = log.scrollHeight;
    },
    done: () => made.removeAttribute("aria-busy"),
    lost(why) {
      made.removeAttribute("aria-busy");
      made.classList.add("lost");
      if (why) made.append(element("p", { className: "soft", text: why }));
    },
  };
  if (history(id).lines.length === 0) $("log").replaceChildren();
  history(id).lines.push(one);
  $("log").append(made);
  $("log").scrollTop = $("log").scrollHeight;
  return one;
}

// The lines so far led to this version.
export const reached = (id, version) => history(id).versions.set(version, [...history(id).lines]);

export function rolledBack(id, version, as) {
  const one = history(id);
  one.lines = [...(one.versions.get(version) ?? [])];
  one.versions.set(as, [...one.lines]);
}

export function forked(id, version, twin) {
  const lines = history(id).versions.get(version) ?? [];
  histories.set(twin.id, { lines: lines.map(copy), versions: new Map() });
  reached(twin.id, twin.version);
}

export const forgotten = (id) => histories.delete(id);

const copy = (line) => ({ element: line.element.cloneNode(true) });
