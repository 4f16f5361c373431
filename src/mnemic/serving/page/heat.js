// A heat map on a canvas, with the same numbers as a table below it.

import { element } from "./dom.js";

const WIDTH = 640;
const ROW = 28;

export const number = (value) => (value === null ? "–" : value.toPrecision(3));

// values: rows of numbers or nulls. labels: { rows: names, each: columns that one number stands for }.
export function heatMap(title, values, labels) {
  const known = values.flat().filter((value) => value !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const canvas = element("canvas", { role: "img", "aria-label": said(title, values, labels, low, high) });
  paint(canvas, values, low, high);
  const legend = known.length ? `From ${number(low)}, faint, to ${number(high)}, strong.` : "No numbers.";
  const caption = element("figcaption", { text: `${title}. ${legend}` });
  const numbers = element("details", {}, element("summary", { text: "Numbers" }));
  // Tables are large; most are never looked at.
  numbers.addEventListener("toggle", () => numbers.childElementCount < 2 && numbers.append(table(title, values, labels)));
  return element("figure", {}, caption, canvas, numbers);
}

function said(title, values, labels, low, high) {
  const [rows, columns] = [values.length, values[0].length];
  if (!Number.isFinite(high)) return `${title}: no numbers`;
  const row = values.findIndex((one) => one.includes(high));
  const most = row < 0 ? "" : `, the most at ${labels.rows[row]}, column ${values[row].indexOf(high) * labels.each}`;
  return `${title}: ${rows} by ${columns} numbers from ${number(low)} to ${number(high)}${most}`;
}

function paint(canvas, values, low, high) {
  const columns = values[0].length;
  const step = Math.max(4, Math.floor(WIDTH / columns));
  const gap = step > 6 ? 1 : 0;
  [canvas.width, canvas.height] = [columns * step - gap, values.length * ROW - gap];
  const style = getComputedStyle(document.documentElement);
  const [cold, hot] = ["--cold", "--hot"].map((name) => colour(style.getPropertyValue(name)));
  const drawing = canvas.getContext("2d");
  values.forEach((row, y) =>
    row.forEach((value, x) => {
      if (value === null) return;
      const share = high > low ? (value - low) / (high - low) : 0;
      const mixed = cold.map((part, i) => Math.round(part + share * (hot[i] - part)));
      drawing.fillStyle = `rgb(${mixed.join(" ")})`;
      drawing.fillRect(x * step, y * ROW, step - gap, ROW - (values.length > 1 ? 1 : 0));
    }),
  );
}

const colour = (text) => [1, 3, 5].map((at) => parseInt(text.trim().slice(at, at + 2), 16));

function table(title, values, labels) {
  const columns = values[0].map((_, x) => x * labels.each);
  const head = element("tr", {}, ...["", ...columns].map((text) => element("th", { scope: "col", text: `${text}` })));
  const body = values.map((row, y) =>
    element("tr", {}, element("th", { scope: "row", text: labels.rows[y] }), ...row.map((value) => element("td", { text: number(value) }))),
  );
  const made = element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
  return element("div", { className: "scroll", role: "region", "aria-label": `${title}, numbers`, tabIndex: 0 }, made);
}
