// Calls of the server. Errors carry its own words.

const KEY = "mnemic-key";

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const useKey = (key) => sessionStorage.setItem(KEY, key);

// Addresses are relative, so that the page works behind a prefix.
export async function request(method, path, { json, body, headers = {}, signal } = {}) {
  const key = sessionStorage.getItem(KEY);
  if (key !== null) headers = { ...headers, Authorization: `Bearer ${key}` };
  if (json !== undefined) {
    headers = { ...headers, "Content-Type": "application/json" };
    body = JSON.stringify(json);
  }
  let response;
  try {
    response = await fetch(path, { method, headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.", 0);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export const call = async (...given) => (await request(...given)).json();

async function failure(response) {
  const text = await response.text();
  try {
    return new ServerError(JSON.parse(text).error.message, response.status);
  } catch {
    // Something in front of the server answered.
    return new ServerError(`${response.status} ${response.statusText}`, response.status);
  }
}

// The values of server-sent events, up to [DONE].
export async function* events(response) {
  let waiting = "";
  for await (const text of texts(response.body)) {
    const parts = (waiting + text).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const value = JSON.parse(data);
      if (value.error) throw new ServerError(value.error.message, response.status);
      yield value;
    }
  }
  throw new ServerError("The connection broke before the answer was complete.", 0);
}

async function* texts(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield decoder.decode(value, { stream: true });
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
