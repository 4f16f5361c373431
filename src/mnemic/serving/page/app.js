// Wires the page up. Everything that asks the server something goes through `doing`.

import { call, useKey } from "./api.js";
import { $ } from "./dom.js";
import * as sessions from "./sessions.js";
import { doing, state } from "./state.js";
import { read, say } from "./talk.js";

const start = () =>
  doing(async () => {
    state.model = (await call("GET", "v1/models")).data[0].id;
    $("key-form").hidden = true;
    $("model").textContent = state.model;
    try {
      await sessions.open(location.hash.length > 1 ? decodeURIComponent(location.hash.slice(1)) : null);
    } catch (error) {
      // The address may name a session that is gone.
      if (error.status === 404) await sessions.open(null);
      throw error;
    }
  });

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value.trim());
  $("key").value = "";
  start();
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("message").value.trim()) say($("message").value);
});
$("message").addEventListener("keydown", (event) => {
  // While an input method composes, Enter is its own.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});

const stop = () => state.doing?.stops && state.doing.stop();
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => event.key === "Escape" && !event.isComposing && stop());

function pick(button, input, take) {
  $(button).addEventListener("click", () => $(input).click());
  $(input).addEventListener("change", () => {
    const files = [...$(input).files];
    // So that the same file can be chosen again.
    $(input).value = "";
    if (files.length) take(files);
  });
}
pick("document", "document-file", read);
pick("import", "import-file", ([file]) => doing(() => sessions.take(file)));

$("new").addEventListener("click", async () => {
  await doing(() => sessions.open(null));
  $("message").focus();
});
$("more").addEventListener("click", sessions.more);
$("fork").addEventListener("click", () => doing(() => sessions.fork()));
$("export").addEventListener("click", () => doing(sessions.save));
$("delete").addEventListener("click", () => {
  $("confirm-text").textContent = `Delete session ${state.session.id} and all that it remembers?`;
  $("confirm").showModal();
});
$("confirm-no").addEventListener("click", () => $("confirm").close());
$("confirm-yes").addEventListener("click", async () => {
  $("confirm").close();
  await doing(sessions.remove);
  $("message").focus();
});

const carries = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  $("chat").classList.add("over");
});
document.addEventListener("dragleave", (event) => event.relatedTarget === null && $("chat").classList.remove("over"));
document.addEventListener("drop", (event) => {
  if (!carries(event)) return;
  event.preventDefault();
  $("chat").classList.remove("over");
  read([...event.dataTransfer.files]);
});

start();
