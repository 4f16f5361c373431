// The list of sessions, the one that is shown, and its versions.

import { call, request } from "./api.js";
import { $, bytes, count, element, when } from "./dom.js";
import * as memory from "./memory.js";
import { doing, idle, state } from "./state.js";
import * as transcript from "./transcript.js";

const PAGE = 50;
let records = [];

export const address = (id, what = "") => `v1/sessions/${encodeURIComponent(id)}${what}`;

export async function list(after = null) {
  const rest = after === null ? "" : `&after=${encodeURIComponent(after)}`;
  const page = await call("GET", `v1/sessions?limit=${PAGE}${rest}`);
  records = after === null ? page.data : [...records, ...page.data];
  $("more").hidden = !page.has_more;
  draw();
}

export const more = () => doing(() => list(records.at(-1).id));

function draw() {
  $("session-list").replaceChildren(...records.map(item));
  idle();
}

function item(record) {
  const said = [`${count(record.tokens_seen)} tokens`, bytes(record.state_bytes), when(record.used)].join(" · ");
  const button = element(
    "button",
    { type: "button", className: "session", onclick: () => doing(() => open(record.id)) },
    element("span", { className: "name", text: record.id }),
    element("span", { className: "soft", text: said }),
  );
  button.dataset.idle = "";
  if (record.id === state.session?.id) button.setAttribute("aria-current", "true");
  return element("li", {}, button);
}

// Shows a session, or an empty page for the next one.
export async function open(id) {
  await show(id === null ? null : await call("GET", address(id)));
}

export async function show(record) {
  state.session = record;
  history.replaceState(null, "", record === null ? location.pathname : `#${encodeURIComponent(record.id)}`);
  transcript.shown(record);
  await refresh();
}

// The session that the next message goes to; made where there is none.
export async function current() {
  if (state.session === null) await show(await call("POST", "v1/sessions", { json: {} }));
  return state.session.id;
}

// Everything about the session that the server knows, anew.
export async function refresh() {
  if (state.session !== null) state.session = await call("GET", address(state.session.id));
  const session = state.session;
  $("session-title").textContent = session === null ? "New session" : session.id;
  $("facts").textContent = session === null ? "" : facts(session);
  $("actions").hidden = session === null;
  if (session === null || session.version === 0) {
    $("version-list").replaceChildren();
    memory.empty();
    await list();
    return;
  }
  const [commits, view] = await Promise.all([
    call("GET", address(session.id, "/commits")),
    call("GET", address(session.id, "/memory")),
    list(),
  ]);
  $("version-list").replaceChildren(...commits.data.map((commit) => version(session, commit)));
  idle();
  memory.show(view);
}

function facts(session) {
  const parent = session.parent === null ? [] : [`forked from ${session.parent}`];
  const said = [`${count(session.tokens_seen)} tokens read`, `${bytes(session.state_bytes)} kept`];
  return [...said, `version ${session.version}`, ...parent].join(" · ");
}

function version(session, commit) {
  const said = `Version ${commit.version} · ${count(commit.tokens_seen)} tokens · ${commit.note} · ${when(commit.created)}`;
  const act = (text, work) => {
    const label = `${text} version ${commit.version}`;
    const button = element("button", { type: "button", text, "aria-label": label, onclick: () => doing(work) });
    button.dataset.idle = "";
    return button;
  };
  const buttons = [act("Fork", () => fork(commit.version))];
  if (commit.version !== session.version) buttons.unshift(act("Roll back to", () => rollBack(commit.version)));
  return element("li", { value: commit.version }, element("span", { className: "soft", text: said }), ...buttons);
}

async function rollBack(to) {
  const { id } = state.session;
  const record = await call("POST", address(id, "/rollback"), { json: { version: to } });
  transcript.rolledBack(id, to, record.version);
  await show(record);
}

export async function fork(from = null) {
  const { id, version: last } = state.session;
  const twin = await call("POST", address(id, "/fork"), { json: from === null ? {} : { version: from } });
  transcript.forked(id, from ?? last, twin);
  await show(twin);
}

export async function take(file) {
  const headers = { "Content-Type": "application/octet-stream" };
  await show(await call("POST", "v1/sessions/import", { body: file, headers }));
}

export async function save() {
  const { id } = state.session;
  const content = await (await request("GET", address(id, "/export"))).blob();
  const link = element("a", { href: URL.createObjectURL(content), download: `${id}.mnemic` });
  link.click();
  // The browser may begin to read it a little later.
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

export async function remove() {
  const { id } = state.session;
  await call("DELETE", address(id));
  transcript.forgotten(id);
  await open(null);
}
