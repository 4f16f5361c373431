// What the page knows, and what it is doing: one thing at a time.

import { $ } from "./dom.js";
import { ServerError } from "./api.js";

// session: the record that is shown; null for one that the first message makes.
export const state = { model: null, session: null, doing: null };

export function tell(error) {
  $("error").hidden = error === null;
  if (error === null) return;
  if (!(error instanceof ServerError)) console.error(error);
  $("error").textContent = error.message;
  if (error.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
}

export function idle() {
  for (const one of document.querySelectorAll("[data-idle]")) one.disabled = state.doing !== null;
  $("stop").hidden = state.doing === null || !state.doing.stops;
}

// Runs `work(signal)`, after what ends by itself soon; while an answer is made or a document read, nothing else begins.
// Those are stopped by Stop and Escape, which abort the signal. Tells what fails. Returns whether it was done.
export async function doing(work, { stops = false } = {}) {
  while (state.doing !== null && !state.doing.stops) await state.doing.ended;
  if (state.doing !== null) return false;
  const [controller, focused] = [new AbortController(), document.activeElement];
  let end;
  const ended = new Promise((resolve) => (end = resolve));
  state.doing = { stop: () => controller.abort(), stops, ended };
  tell(null);
  idle();
  let failure = null;
  try {
    await work(controller.signal);
  } catch (error) {
    failure = error;
  }
  const lost = document.activeElement === document.body;
  state.doing = null;
  idle();
  // What was pressed was disabled meanwhile, and lost the focus.
  if (lost) (focused.isConnected && focused.checkVisibility() && focused !== document.body ? focused : $("message")).focus();
  if (failure !== null && failure.name !== "AbortError") tell(failure);
  end();
  return failure === null;
}

// What is being done cannot be stopped any more, and soon ends.
export function ending() {
  const stopped = document.activeElement === $("stop");
  state.doing.stops = false;
  idle();
  if (stopped) $("message").focus();
}
