// Small things for elements. Text only ever becomes text.

export const $ = (id) => document.getElementById(id);

export function element(name, { text, ...given } = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key.includes("-") || key === "role" || key === "scope") made.setAttribute(key, value);
    else made[key] = value;
  }
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

export const count = (number) => number.toLocaleString("en");

export function bytes(number) {
  if (number < 10_000) return `${count(number)} bytes`;
  return number < 1e7 ? `${count(Math.round(number / 1000))} kB` : `${count(Math.round(number / 1e6))} MB`;
}

export function when(seconds) {
  const time = new Date(seconds * 1000);
  const today = time.toDateString() === new Date().toDateString();
  return today ? time.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }) : time.toLocaleDateString();
}
