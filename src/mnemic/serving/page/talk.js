// Messages and documents for the session that is shown.

import { ServerError, call, events, request } from "./api.js";
import { $, count } from "./dom.js";
import { address, current, refresh } from "./sessions.js";
import { doing, ending, state } from "./state.js";
import { line, reached } from "./transcript.js";

const POLL_MS = 400;
const STOPPED = "Stopped. The session has read neither the message nor this.";

export const say = (text) =>
  doing(
    async (signal) => {
      const id = await current();
      const [message, answer] = [line(id, "user", text), line(id, "assistant")];
      $("message").value = "";
      try {
        await stream(id, text, answer, signal);
      } catch (error) {
        message.lost();
        answer.lost(error.name === "AbortError" ? STOPPED : "");
        if ($("message").value === "") $("message").value = text;
        throw broken(error);
      } finally {
        ending();
        await refresh();
      }
    },
    { stops: true },
  );

async function stream(id, text, answer, signal) {
  const json = { model: state.model, messages: [{ role: "user", content: text }], stream: true };
  answer.begin();
  const headers = { "X-Session-Id": id };
  const response = await request("POST", "v1/chat/completions", { json, headers, signal });
  let version = null;
  for await (const event of events(response)) {
    for (const choice of event.choices) answer.add(choice.delta.content ?? "");
    version = event.session?.version ?? version;
  }
  answer.done();
  reached(id, version);
}

export const read = (files) =>
  doing(
    async (signal) => {
      try {
        for (const file of files) await feed(await current(), file, signal);
      } finally {
        ending();
        await refresh();
      }
    },
    { stops: true },
  );

async function feed(id, file, signal) {
  const at = address(id);
  const progress = (tokens, share) => {
    $("progress-bar").value = share;
    $("progress-text").textContent = `${file.name}: ${count(tokens)} tokens, ${Math.floor(100 * share)}%`;
  };
  progress(0, 0);
  $("progress").hidden = false;
  // The answer comes when all has been read, and the browser shows nothing of it before all has been sent; so ask.
  const asking = setInterval(async () => {
    const { feeding } = await call("GET", at, { signal }).catch(() => ({ feeding: null }));
    if (feeding !== null && !$("progress").hidden) progress(feeding.tokens_read, feeding.bytes_read / file.size);
  }, POLL_MS);
  try {
    const headers = { "Content-Type": "text/plain; charset=utf-8" };
    const done = await call("POST", `${at}/documents`, { body: file, headers, signal });
    line(id, "note", `${file.name}: ${count(done.tokens_read)} tokens read.`);
    reached(id, done.session.version);
  } catch (error) {
    const why = error.name === "AbortError" ? "stopped, nothing of it is remembered." : "not read.";
    line(id, "note", `${file.name}: ${why}`);
    throw broken(error);
  } finally {
    clearInterval(asking);
    $("progress").hidden = true;
  }
}

function broken(error) {
  if (error instanceof ServerError || error.name === "AbortError") return error;
  return new ServerError("The connection broke before it was complete.", 0);
}
